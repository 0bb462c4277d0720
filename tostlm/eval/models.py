"""The models that are evaluated: checkpoints, and causal language models in Hugging Face's folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tostlm.checkpoint import Checkpoint, load_checkpoint, run_folder
from tostlm.data import Tokenizer, import_tokenizer
from tostlm.errors import UserError, error_summary
from tostlm.eval.token_scores import TokenScore, nats, scores_in_pieces, token_scores
from tostlm.files import short_names
from tostlm.formats import content_of, is_hugging_face

HF_PASS_TOKENS = 1024  # tokens whose logits are held at a time: of all of them, whether scored or not
# The names under which transformers' configs have the longest context that a model was made for.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


class ScoredModel(ABC):
    """A causal language model that says how well it predicts tokens of its tokenizer.

    Attributes:
        path: its checkpoint or folder.
        folder: what it is named by: the run's folder, or its own.
        step: of its training; None where that is unknown.
        positions: the longest context that it can read; None without a limit.
        clamped: how many learned positions it has where it uses the last one beyond them; None where it does not.
    """

    path: Path
    folder: Path
    step: int | None
    positions: int | None
    clamped: int | None = None
    tokenizer: Tokenizer
    device: torch.device

    @abstractmethod
    def score(self, rows: Tensor, scored: int, pass_tokens: int, score: TokenScore = nats) -> Tensor:
        """Return scores of the last `scored` tokens of rows [B, T + 1], by default their losses: [B, scored, ...]."""

    @property
    @abstractmethod
    def content(self) -> str:
        """A hash of its weights, or what stands for them."""


class TostModel(ScoredModel):
    """A checkpoint's model; with `clamp` it uses the last of its learned positions beyond them."""

    def __init__(self, checkpoint: Checkpoint, clamp: bool = False) -> None:
        self.lm = checkpoint.lm
        self.path, self.folder = checkpoint.path, run_folder(checkpoint.path)
        self.step, self.positions = checkpoint.train_state.step, checkpoint.config.model.positions
        if clamp and self.positions is not None:
            self.lm.clamps_positions, self.clamped, self.positions = True, self.positions, None
        self.tokenizer, self.device = checkpoint.tokenizer, checkpoint.lm.embed.weight.device
        self.data = checkpoint.config.data.folders[0]  # of a blend the first one
        self._content = checkpoint.content  # now, as the run may remove the checkpoint later

    def score(self, rows: Tensor, scored: int, pass_tokens: int, score: TokenScore = nats) -> Tensor:
        return token_scores(self.lm, rows, scored, pass_tokens, score)

    @property
    def content(self) -> str:
        return self._content


class HuggingFaceModel(ScoredModel):
    """A causal language model in a folder of Hugging Face's: config.json, weights and a tokenizer.

    It reads what `positions` of its config allow, from an end-of-document token on, as a checkpoint does.

    Raises:
        UserError: transformers is missing, cannot load the folder, or would run code of it that is not trusted.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype | None, trust_code: bool) -> None:
        try:
            import transformers
        except ImportError:
            raise UserError(f"{path} is a Hugging Face model, which takes `pip install 'tostlm[eval]'`") from None
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        try:
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", trust_remote_code=trust_code, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            if "trust_remote_code" in str(error):
                raise UserError(f"{path} has code of its own; read it, then pass --trust-remote-code") from None
            raise UserError(f"transformers cannot load {path}: {error_summary(error)}") from None
        self._model.to(device).eval().requires_grad_(False)
        self.path = self.folder = path
        self.step, self.device, self.tokenizer = None, device, import_tokenizer(path)
        found = (getattr(self._model.config, name, None) for name in POSITIONS)
        self.positions = next((int(positions) for positions in found if positions), None)

    @torch.no_grad()
    def score(self, rows: Tensor, scored: int, pass_tokens: int, score: TokenScore = nats) -> Tensor:
        def read(piece: Tensor, past: Any) -> tuple[Tensor, Any]:
            output = self._model(piece, past_key_values=past, use_cache=True)
            return output.logits, output.past_key_values

        def score_logits(logits: Tensor, targets: Tensor) -> Tensor:
            found: Tensor = score(logits.float().flatten(0, 1), targets.flatten()).unflatten(0, targets.shape)
            return found

        return scores_in_pieces(rows, scored, min(pass_tokens, HF_PASS_TOKENS), read, score_logits)

    @property
    def content(self) -> str:
        return content_of(self.path)


def folder_names(places: Sequence[tuple[Path, int | None]]) -> list[str]:
    """Return the last parts of each folder that tell it apart, and its step where the folder stands with several."""
    resolved = [(folder.resolve(), step) for folder, step in places]
    folders = list(dict.fromkeys(folder for folder, _ in resolved))
    names = dict(zip(folders, short_names(folders), strict=True))
    several = {folder for folder, step in resolved if any(f == folder and s != step for f, s in resolved)}
    return [names[f] + (f" step {s:,}" if f in several and s is not None else "") for f, s in resolved]


def model_names(models: Sequence[ScoredModel]) -> list[str]:
    """Return the `folder_names` of models, numbered where one is there twice."""
    found = list[str]()
    for name in folder_names([(model.folder, model.step) for model in models]):
        before = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({before + 1})" if before else name)
    return found


def open_model(
    path: Path, device: torch.device, dtype: torch.dtype | None, trust_code: bool = False, clamp: bool = False
) -> ScoredModel:
    """Return the model of a checkpoint, of a run's newest one, or of a Hugging Face folder.

    Args:
        dtype: of the weights; None is as they are saved.
        trust_code: run the code that a Hugging Face folder brings.
        clamp: let a checkpoint's model read beyond its learned positions, where it uses the last one.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    if is_hugging_face(path):
        return HuggingFaceModel(path, device, dtype, trust_code)
    checkpoint = load_checkpoint(path, device)
    if dtype is not None:
        checkpoint.lm.to(dtype)
    return TostModel(checkpoint, clamp)
