"""tostlm: pretraining language models whose token mixer is linear in the context."""

__version__ = "0.1.0"
