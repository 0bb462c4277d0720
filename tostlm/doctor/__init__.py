"""What would spoil a run, found before it: measured on all ranks, judged from the numbers, told by rank and host."""

from tostlm.doctor.command import doctor

__all__ = ["doctor"]
