"""Reading and writing run configs: one YAML file per run, dotted overrides, and the configs that are shipped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import pydantic
import yaml

from tostlm.config.deepspeed_block import nearest
from tostlm.config.recipes import expand_recipe
from tostlm.config.sections import RunConfig
from tostlm.errors import UserError
from tostlm.model import MIXERS, ModelConfig
from tostlm.model.config import MAX_SIZE

Validated = TypeVar("Validated", bound=pydantic.BaseModel)
BASE, STEP_SEQUENCES = "gpt2-base", 480  # whose recipe imported models are trained on by, and its sequences a step
EXAMPLE = "`tostlm config show quickstart` prints one"
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: not UTF-8, or an impossible date


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file, or a shipped config by its name.

    `overrides` are KEY=VALUE with dotted keys, an index for a list, and YAML values.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    path = find_config(path)
    raw = read_mapping(path, "config", EXAMPLE)
    for override in overrides:
        _apply(raw, override)
    if "model" in raw:
        raw["model"] = expand_recipe(raw["model"], str(path))
    return validate_mapping(RunConfig, raw, str(path))


def restore_config(text: str, name: str) -> RunConfig:
    """Return what `dump_config` has written, of this version or an older one: keys that it had not yet are at defaults.

    `name` is for the user: where the text stands.

    Raises:
        UserError: this version cannot read it.
    """
    return validate_mapping(RunConfig, _parse_mapping(text, "config", name, EXAMPLE), name)


def read_mapping(path: Path, kind: str, example: str) -> dict[str, Any]:
    """Read a YAML file that holds keys and values. `kind` and `example` are for the user: what it is, where to see one.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        return _parse_mapping(path.read_bytes(), kind, str(path), example)
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from None


def _parse_mapping(text: str | bytes, kind: str, name: str, example: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text.decode() if isinstance(text, bytes) else text, _Loader)
    except NOT_YAML as error:
        raise UserError(f"{kind} {name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{kind} {name} must be a mapping of keys; {example}")
    return raw


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML is 1.1: floats may be written 3e-4, and a key stands once in a mapping.

    What 1.1 reads as another number, 010 as 8 and 1:30 as 90, is a text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in own:
            if own.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"it names the key {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


_NUMBERS = {  # of the core schema, but for numbers that begin with a zero
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$",
    "tag:yaml.org,2002:float": r"^[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|"
    r"\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} is not KEY=VALUE, as in optimizer.lr=3e-4")
    *parents, last = key.split(".")
    node: Any = raw
    for parent in parents:
        node = node[_index(node, parent, override)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise UserError(f"override {override!r}: {parent} holds a value, not keys")
    place = _index(node, last, override) if isinstance(node, list) else last
    try:
        parsed = yaml.load(value, _Loader)
        # Of a plain string YAML would drop what follows a space and #, as in the name of a folder.
        node[place] = value if parsed and isinstance(parsed, str) and value.startswith(parsed) else parsed
    except NOT_YAML:
        raise UserError(f"override {override!r}: {value!r} is not a YAML value") from None


def _index(node: list[Any], key: str, override: str) -> int:
    if not (key.isdecimal() and int(key) < len(node)):
        raise UserError(f"override {override!r}: {key} must be an index of a list of {len(node)}")
    return int(key)


def validate_mapping(kind: type[Validated], raw: dict[str, Any], name: str) -> Validated:
    """Return what a mapping says as a pydantic model; raise UserError about the first mistake in the file `name`."""
    try:
        content = json.dumps(raw, default=str)
    except ValueError:
        raise UserError(f"{name}: a YAML alias stands inside what it names; write it out") from None
    try:
        return kind.model_validate_json(content, strict=True)
    except pydantic.ValidationError as error:
        # An unknown key often leaves its namesake missing: name the cause, not the consequence.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] not in _UNKNOWN_KEY)
        raise UserError(f"{name}: {_explain(problems[0], kind)}") from None


def training_config(model: ModelConfig, precision: str) -> RunConfig:
    """Return a config that trains a model on: the recipe of `BASE`, for a user to change, with weights of a precision.

    It names no data: `data.path` is a folder that does not exist.
    """
    raw = read_mapping(find_config(Path(BASE)), "config", EXAMPLE)
    context = min(raw["data"]["context_tokens"], model.positions or MAX_SIZE)
    raw |= {"run_dir": "runs/imported", "model": asdict(model)}
    raw["data"] = {"path": "data/of-your-own", "context_tokens": context}
    raw["train"] |= {"batch_tokens": STEP_SEQUENCES * context, "micro_batch_tokens": context}
    if precision != "fp32":
        del raw["deepspeed"]["torch_autocast"]
        raw["deepspeed"][precision] = {"enabled": True}
    return validate_mapping(RunConfig, raw, BASE)


_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def _explain(problem: Any, kind: type[pydantic.BaseModel]) -> str:
    location = _without_union_tags(problem["loc"])
    key = ".".join(str(part) for part in location)
    name = ".".join(part for part in location if isinstance(part, str))  # without indices of lists
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in _UNKNOWN_KEY:
        return f"{key} is an unknown key{nearest(name, (*_keys(kind), 'model.recipe'))}"
    if problem["type"].startswith("missing") and isinstance(location[-1], int):
        return f"{key.rpartition('.')[0]} needs {location[-1] + 1} values or more"
    if problem["type"] == "union_tag_invalid":
        tag, known = problem["ctx"]["tag"], sorted(MIXERS)
        return f"{key}.mixer {tag!r} is not a mixer; use {', '.join(known)}{nearest(tag, known)}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.mixer is missing; name one of {', '.join(sorted(MIXERS))}"
    if problem["type"].startswith("missing"):
        return f"{key} is missing; give it a value"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _without_union_tags(location: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return pydantic's location of an error without the mixer's name that it puts after an index of the layer plan."""
    return tuple(
        part
        for before, part in zip((None, *location), location, strict=False)
        if not (isinstance(before, int) and part in MIXERS)
    )


def _keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key of a section and of the sections in it, with dots between."""
    hints = get_type_hints(section) if is_dataclass(section) else {}
    hints |= {name: field.annotation for name, field in getattr(section, "model_fields", {}).items()}
    for name, hint in hints.items():
        if get_origin(hint) is ClassVar:
            continue
        yield prefix + name
        for kind in _sections_in(hint):
            yield from _keys(kind, f"{prefix}{name}.")


def _sections_in(hint: Any) -> Iterator[Any]:
    """Yield the sections that a type hint mentions, in unions, tuples and annotations too."""
    if is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, pydantic.BaseModel)):
        yield hint
    for inner in get_args(hint):
        yield from _sections_in(inner)


FOLDER = Path(str(files("tostlm"))) / "configs"  # in a checkout a link to configs/, in a wheel the files themselves


class ShippedConfig(NamedTuple):
    """A config of the package."""

    name: str  # what commands take for it, as in `tostlm train NAME`
    path: Path
    summary: str  # the first line of the comment that the file begins with


def shipped_configs() -> list[ShippedConfig]:
    """Return the configs of the package, sorted by name."""
    return [
        ShippedConfig(path.stem, path, path.read_text().splitlines()[0].removeprefix("# "))
        for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)
    ]


def find_config(path: Path) -> Path:
    """Return the file that a command's CONFIG argument means: a file itself, or a shipped config by its name.

    Raises:
        UserError: it is neither.
    """
    if path.exists():
        return path
    shipped = {config.name: config.path for config in shipped_configs()}
    if str(path) in shipped:
        return shipped[str(path)]
    close = nearest(path.stem, shipped)
    raise UserError(f"config {path} is neither a file nor a shipped config{close}; `tostlm config list` shows them")
