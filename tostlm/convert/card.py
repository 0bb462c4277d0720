"""The model card of an exported model: what it is, how it is used, and what is on record of its training."""

from __future__ import annotations

from pathlib import Path

from tostlm.checkpoint import CONFIG, Checkpoint, run_folder
from tostlm.eval.chapters import chapters
from tostlm.eval.page import markdown, read_findings, write_plots
from tostlm.eval.report import escaped
from tostlm.model import count_parameters

CARD = "README.md"
UNKNOWN = "unknown"  # Hugging Face's word for a license that nobody named


def write_card(checkpoint: Checkpoint, folder: Path, own_class: bool, license: str) -> None:
    """Write the card of a model in a folder, with plots where its run's folder has what they show.

    Args:
        own_class: whether the folder has the code of tostlm's class.
        license: as the card's field has it, such as "apache-2.0".
    """
    name = run_folder(checkpoint.path).resolve().name
    code = ", trust_remote_code=True" if own_class else ""
    size = count_parameters(checkpoint.lm.config)
    parts = [
        _fields(license, own_class),
        f"# {escaped(name)}",
        f"A causal language model of {size:,} parameters, pretrained with tostlm"
        + (" and converted to transformers' GPT-2." if not own_class else ". Its code is in this folder."),
        "## Use",
        _fenced(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{code})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{code})\n'
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))",
        ),
        f"A text begins with `{checkpoint.tokenizer.eos_token}`, which the tokenizer puts before it.",
        f"`hf upload USER/{name} .` in this folder publishes it.",
    ]
    if checkpoint.path.is_dir() and (checkpoint.path / CONFIG).is_file():
        written = [chapter for chapter in chapters(read_findings([checkpoint.path])) if chapter.rows]
        write_plots(written, folder)
        parts.append(markdown(written))
    (folder / CARD).write_text("\n\n".join(parts).rstrip() + "\n")


def _fields(license: str, own_class: bool) -> str:
    tags = ["tostlm", *(["custom_code"] if own_class else ["gpt2"])]
    return "\n".join(
        ["---", f"license: {license}", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
        + [f"- {tag}" for tag in tags]
        + ["---"]
    )


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
