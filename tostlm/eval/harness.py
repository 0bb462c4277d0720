"""Checkpoints as models of EleutherAI's lm-eval, to which importing this file registers them as "tostlm".

It takes lm-eval (`pip install 'tostlm[harness]'`):
`lm_eval.simple_evaluate(model="tostlm", model_args="checkpoint=PATH", tasks=[...])`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tostlm.device import best_device, parse_device, parse_dtype
from tostlm.errors import UserError
from tostlm.eval.generate import prompt_tokens, write_batch
from tostlm.eval.models import TostModel, open_model
from tostlm.eval.sampling import Sampling
from tostlm.eval.token_scores import PASS_TOKENS, nats_and_hits, token_scores
from tostlm.eval.writer import read_context
from tostlm.formats import is_hugging_face

DEFAULT_NEW_TOKENS = 256  # that are generated where a task does not say, as by lm-eval's own models
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
OPTIONS = {*SAMPLING_OPTIONS, "until", "max_gen_toks", "do_sample", "num_beams"}  # of a task's generation_kwargs


class Continuation(NamedTuple):
    """Tokens to score, and those before them, of which there is at least one."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def read(self) -> int:
        """The number of tokens that a model reads to score them."""
        return len(self.context) + len(self.tokens) - 1


class Generation(NamedTuple):
    """How a task wants a text continued."""

    tokens: int  # at most
    stop: tuple[str, ...]
    sampling: Sampling


@register_model("tostlm")
class HarnessLM(TemplateLM):  # type: ignore[misc, unused-ignore]  # it has no types
    """A checkpoint that answers lm-eval's requests.

    A context that several continuations share is read once, and they continue from its state. A text begins after the
    end-of-document token, as in training. A model of learned positions reads the last tokens that these hold.

    Args:
        checkpoint: a checkpoint, or a run's folder for its newest one.
        device: cpu, cuda or cuda:N; None is the GPU if there is one.
        dtype: of the weights: fp32, bf16 or fp16; None is as saved.
        batch_tokens: that a forward pass reads, over all texts of a batch.

    Raises:
        UserError: there is no such checkpoint, device or dtype.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = PASS_TOKENS,
    ) -> None:
        super().__init__()
        path = Path(checkpoint)
        if is_hugging_face(path):
            of_lm_eval = f"`lm_eval --model hf --model_args pretrained={path}`"
            raise UserError(f"{path} is a Hugging Face folder, which lm-eval reads itself: {of_lm_eval}")
        found = best_device() if device is None else parse_device(device)
        model = open_model(path, found, None if dtype is None else parse_dtype(dtype))
        assert isinstance(model, TostModel)
        self.model, self._lm, self._tokenizer = model, model.lm, model.tokenizer
        self._batch_tokens = batch_tokens

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token, which stands before an empty context too."""
        return self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text after the end-of-document token, without it if `add_special_tokens` is False."""
        tokens = prompt_tokens(self._tokenizer, string)
        return tokens[1:] if add_special_tokens is False else tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return of each continuation its log-probability in nats, and whether greedy generation would write it.

        Args:
            requests: the texts, the tokens of the context and those of the continuation, as `loglikelihood` makes them.

        Raises:
            UserError: a continuation has no token of its own, or more than the model's positions.
        """
        rows = []
        for texts, context, tokens in requests:
            if not tokens:
                reason = "the tokenizer joins them, so that none of its tokens is of the second alone"
                raise UserError(f"of {texts!r}, {reason}; change the task's target_delimiter")
            rows.append(self._fitting(context, tokens))
        return self._score(rows, disable_tqdm)

    def _fitting(self, context: Sequence[int], tokens: Sequence[int]) -> Continuation:
        """Return a continuation with as much of the context as the positions hold."""
        limit = self.model.positions
        if limit is None:
            return Continuation(tuple(context), tuple(tokens))
        if len(tokens) > limit:
            raise UserError(f"a continuation of {len(tokens)} tokens is longer than the model's {limit} positions")
        return Continuation(tuple(context[-(limit + 1 - len(tokens)) :]), tuple(tokens))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each request's whole text in nats.

        A text is read in one go; a model of learned positions reads it in windows of as many, as lm-eval divides it.
        """
        rows, owners = list[Continuation](), list[int]()
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            length = self.model.positions or max(1, len(tokens))
            for window in get_rolling_token_windows(tokens, self.eot_token_id, length, context_len=1):
                context, scored = make_disjoint_window(window)
                rows.append(Continuation(tuple(context), tuple(scored)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (found, _) in zip(owners, self._score(rows, disable_tqdm), strict=True):
            totals[owner] += found
        return totals

    def _score(self, rows: Sequence[Continuation], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        found: dict[int, tuple[float, bool]] = {}
        # Neighbours share a context or have one of about the same length. The longest come first: if the memory is too
        # small, that shows at once.
        order = sorted(range(len(rows)), key=lambda n: (len(rows[n].context), rows[n].context, rows[n].read))[::-1]
        with tqdm(total=len(rows), desc="scored", disable=disable_tqdm or None) as bar:
            for batch in self._batches(rows, order):
                found |= dict(zip(batch, self._score_batch([rows[n] for n in batch]), strict=True))
                bar.update(len(batch))
        return [found[n] for n in range(len(rows))]

    def _batches(self, rows: Sequence[Continuation], order: Sequence[int]) -> Iterator[list[int]]:
        """Yield the numbers of rows that are read together, in some order."""
        batch, longest = list[int](), 0
        for number in order:
            longest = max(longest, rows[number].read)
            if batch and longest * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch, longest = [], rows[number].read
            batch.append(number)
        if batch:
            yield batch

    def _score_batch(self, rows: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """Return as `_score` does, of rows that are read together.

        What all contexts are long enough for is read once per context. The rest of each row, padded on the right, which
        has no influence on what is before, continues from there.
        """
        common = min(len(row.context) for row in rows) - 1  # the last token of a context predicts the next one
        starts = list(dict.fromkeys(row.context[:common] for row in rows))
        state = read_context(self._lm, self._tensor(starts), pass_tokens=self._batch_tokens)
        if state is not None:
            place = {start: number for number, start in enumerate(starts)}
            state = state.select(self._tensor([place[row.context[:common]] for row in rows]))
        rests = [torch.tensor(row.context[common:] + row.tokens) for row in rows]
        padded = pad_sequence(rests, batch_first=True, padding_value=self.eot_token_id).to(self.device)
        score = nats_and_hits(self._tokenizer.vocab_size)
        scores = token_scores(self._lm, padded, padded.shape[1] - 1, self._batch_tokens, score, state).cpu()
        if not torch.isfinite(scores).all():
            raise UserError(f"{self.model.path}: a loss is not finite; the model has diverged, or needs a wider dtype")
        answers = []
        for row, of_row in zip(rows, scores, strict=True):
            first = len(row.context) - 1 - common
            losses, greedy = of_row[first : first + len(row.tokens)].unbind(-1)
            answers.append((-float(losses.double().sum()), bool(greedy.all())))
        return answers

    def _tensor(self, numbers: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each request's context, up to a string of `until`, as `tostlm generate` does.

        Raises:
            UserError: a task's generation_kwargs are not known, or leave a context no room in the model's positions.
        """
        prompts: dict[int, list[int]] = {}
        groups = defaultdict[tuple[int, Generation], list[int]](list)  # of what is written together
        for number, request in enumerate(requests):
            text, options = request.args
            asked = _generation(options)
            prompts[number] = self._prompt(text, asked.tokens)
            groups[len(prompts[number]), asked].append(number)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="written", disable=disable_tqdm or None) as bar:
            for (length, (tokens, stop, sampling)), members in sorted(groups.items(), key=lambda group: -group[0][0]):
                size = max(1, self._batch_tokens // length)
                for some in (members[start : start + size] for start in range(0, len(members), size)):
                    together = [prompts[number] for number in some]
                    texts = write_batch(self._lm, self._tokenizer, together, tokens, sampling, some, stop)
                    found |= dict(zip(some, texts, strict=True))
                    bar.update(len(some))
        return [found[number] for number in range(len(requests))]

    def _prompt(self, text: str, new: int) -> list[int]:
        """Return a context's last tokens, after which the positions hold `new` more."""
        tokens, limit = self.tok_encode(text), self.model.positions
        if limit is None:
            return tokens
        if new >= limit:
            room = f"leave a context no room in the model's {limit} positions"
            raise UserError(f"the {new} new tokens of a task {room}; set max_gen_toks in its generation_kwargs")
        return tokens[-(limit - new) :]


def _generation(options: Mapping[str, Any]) -> Generation:
    """Return what a task's generation_kwargs say.

    Raises:
        UserError: one of them is not known, or out of range.
    """
    try:
        known: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), DEFAULT_NEW_TOKENS))
    except (ValueError, TypeError) as error:
        raise UserError(f"generation_kwargs {dict(options)} of a task cannot be used: {error}") from None
    unknown = [name for name in known if name not in OPTIONS]
    if unknown or known.get("num_beams", 1) != 1:
        names = ", ".join(unknown) or "num_beams above 1"
        raise UserError(f"generation_kwargs of a task has {names}, which is not offered; leave it out of the task")
    new, stop = known["max_gen_toks"], known["until"]
    if not isinstance(new, int) or new < 1 or not all(isinstance(text, str) for text in stop):
        raise UserError(f"generation_kwargs of a task: max_gen_toks {new!r} must be 1 or more, until {stop!r} strings")
    if not known["do_sample"]:
        known["temperature"] = 0.0
    try:
        sampling = Sampling(**{name: known[name] for name in SAMPLING_OPTIONS if name in known})
    except ValueError as error:
        raise UserError(f"generation_kwargs of a task: {error}") from None
    return Generation(new, tuple(stop), sampling)
