"""Converting a model to another format: written aside, compared with its source, and then published."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tostlm.checkpoint import Checkpoint
from tostlm.checkpoint.weights_only import is_among_checkpoints, require_free
from tostlm.convert.deepspeed import write_deepspeed
from tostlm.convert.hf import write_hf
from tostlm.convert.imported import write_checkpoint
from tostlm.convert.int8 import PerplexityCost, write_int8
from tostlm.convert.release import write_release
from tostlm.convert.runtime import write_onnx, write_torch_export
from tostlm.convert.verify import Comparison
from tostlm.errors import UserError
from tostlm.files import atomic_folder, read_json_object

Found = Sequence[Comparison | PerplexityCost]


class Format(NamedTuple):
    """What a model can be converted to."""

    write: Callable[..., Found]  # of a checkpoint and an empty folder, and of its options by name
    advice: str  # what to do with the folder, whose name comes for {out}

    @property
    def options(self) -> set[str]:
        """The names of what may be chosen."""
        parameters = inspect.signature(self.write).parameters.values()
        return {parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY}


FORMATS = {  # by the names that the command line has for them
    "hf": Format(
        write_hf,
        "loads with transformers.AutoModelForCausalLM.from_pretrained('{out}', trust_remote_code=True)",
    ),
    "tostlm": Format(
        write_checkpoint,
        "a checkpoint; train it on with `tostlm train {out}/config.yaml data.path=... run_dir=... --from {out}`",
    ),
    "release": Format(write_release, "the release's sample.py loads it with --out_dir={out}"),
    "deepspeed": Format(
        write_deepspeed, "an engine of its model goes on from it with load_checkpoint and checkpoint.load_universal"
    ),
    "torch-export": Format(
        write_torch_export,
        "torch.export.load reads step.pt2 and prefill.pt2, which continue start.safetensors",
    ),
    "onnx": Format(write_onnx, "onnxruntime reads step.onnx, which continues start.safetensors"),
    "int8": Format(write_int8, "loads as an hf folder does, where torchao is installed"),
}
RECORD = "conversion.json"  # in a converted folder: its format, source and files, and what was compared


def convert(
    checkpoint: Checkpoint, out: Path, write: Callable[[Checkpoint, Path], Found], overwrite: bool = False
) -> Found:
    """Write a model in another format to a folder, and return what was compared before it appeared there.

    Args:
        write: of `FORMATS`.
        overwrite: replace a folder that a conversion has written.

    Raises:
        UserError: `out` exists, cannot be written, or is the source; the format cannot hold the model; what was written
            does not compute the same.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(out)!r} is no name in UTF-8, which libraries need; choose another") from None
    if overwrite and os.path.lexists(out):
        _require_replaceable(checkpoint, out)
    else:
        require_free(out)
    if checkpoint.path.is_dir() and out.resolve().is_relative_to(checkpoint.path.resolve()):
        raise UserError(f"{out} is in {checkpoint.path}, which is converted; choose another folder")
    try:
        with atomic_folder(out) as folder:
            found = write(checkpoint, folder)
            files = _files_of(folder)
            compared = [str(each) for each in found]
            record = {"source": str(checkpoint.path), "files": [*files, RECORD], "compared": compared}
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            _give_usual_modes(folder)
            return found
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; nothing was published") from None


def _files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def _give_usual_modes(folder: Path) -> None:
    """Let others read what libraries have written for their user alone, as far as the user's umask does."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _require_replaceable(checkpoint: Checkpoint, out: Path) -> None:
    record = read_json_object((out / RECORD).read_bytes()) if (out / RECORD).is_file() else None
    if out.is_symlink() or record is None or not isinstance(files := record.get("files"), list):
        raise UserError(f"{out} is no folder that a conversion has written, and is not replaced; choose another")
    if is_among_checkpoints(out):
        raise UserError(f"{out} is among the checkpoints of a run, and is not replaced; choose another folder")
    if added := sorted(set(_files_of(out)) - {str(name) for name in files}):
        raise UserError(f"{out} has what no conversion has written: {', '.join(added[:5])}; move that elsewhere first")
    if checkpoint.path.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the model that is converted; choose another folder")
