"""Text from an exported folder, through transformers alone."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers


def sample(folder: Path, prompt: str, tokens: int) -> str:
    """The prompt and at most `tokens` sampled tokens after it."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.8)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
