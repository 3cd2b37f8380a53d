"""Command-line options generated from dataclasses, so that each option is defined once.

A field of a frozen dataclass becomes an option: its name, type and default give the option's, and its metadata may hold

- `help`: the help text; a field without one is not an option,
- `metavar`: the placeholder of the value in the help,
- `envvar`: an environment variable that sets the option,
- `panel`: the heading that the help lists the option under.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli import guide, terminal
from nybble.load_options import LoadOptions

if typing.TYPE_CHECKING:
    from nybble.model import Model

ThinkOption = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think", help="Whether to reason before the answer; by default as the chat template does."
    ),
]
EffortOption = Annotated[
    str | None,
    typer.Option(
        "--reasoning-effort",
        help="How much to reason, for chat templates that know efforts: low, medium or high.",
        metavar="NAME",
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, a folder or a Hub repository.",
        show_default=False,
        autocompletion=guide.models,
    ),
]
"""The model of a command; None for the default model."""


AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="LoRA adapter to apply: a folder that PEFT has saved, or a GGUF file.",
        metavar="PATH",
        rich_help_panel="Model",
    ),
]
"""The adapter that applies to everything that a command computes."""


def load_model(
    source: str | None,
    options: LoadOptions,
    adapter: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> Model:
    """Loads a model. Draws a progress bar on a terminal if that takes long."""
    from nybble.model import Model

    terminal.show_log()
    # A vocabulary is a few hundred thousand long-lived objects. Scanning them for garbage would take a tenth of the
    # time to the first token.
    gc.disable()
    try:
        return Model.load(source, options, adapter=adapter, adapters=adapters)
    finally:
        gc.enable()


_SAME = object()


@dataclass(frozen=True)
class _Form:
    """The command-line form of a field whose type does not determine it.

    Attributes:
        type: The type of the option.
        metavar: The placeholder of the value in the help.
        parse: Turns the value of the option into that of the field.
        default: The default of the option, if it is not that of the field.
    """

    type: Any
    metavar: str | None = None
    parse: Callable[[Any], Any] | None = None
    default: Any = _SAME


def _parse_biases(items: Sequence[str]) -> dict[int, float]:
    biases = {}
    for item in items:
        token, _, bias = item.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise ValueError(f"logit_bias: found {item!r}, expected ID=BIAS, such as 42=-inf") from None
    return biases


def _text_or_file(name: str, text: str | None) -> str | None:
    """The text itself, or the content of a file for `@FILE`."""
    if text is None or not text.startswith("@"):
        return text
    file = Path(text[1:])
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{name}: {file}: {error}, expected a text file") from None


def _number_or_auto(text: str | None) -> float | str | None:
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expert_memory: found {text!r}, expected a number of gigabytes or auto") from None


_FORMS = {
    "expert_memory": _Form(str | None, parse=_number_or_auto),
    "logit_bias": _Form(list[str], "ID=BIAS", _parse_biases, []),
    "stop": _Form(list[str], "TEXT", tuple, []),
    "schema": _Form(str | None, "TEXT|@FILE", functools.partial(_text_or_file, "schema")),
    "grammar": _Form(str | None, "TEXT|@FILE", functools.partial(_text_or_file, "grammar")),
    "max_tokens": _Form(int),  # A number larger than the context does the same as None.
}
"""The forms of the fields of options whose types have no equivalent on a command line."""

_METAVARS = {int: "N", int | None: "N", float: "NUMBER", float | None: "NUMBER", str: "TEXT", str | None: "TEXT"}
"""Placeholders by type, where the field has none."""
_PANELS = {"EngineOptions": "Engine", "LoadOptions": "Model", "SamplingOptions": "Sampling"}
_NOT_OPTIONS = {
    ("SamplingOptions", "adapter"),  # --adapter applies one to everything.
    ("SamplingOptions", "dry_sequence_breakers"),  # The rest of DRY and of beam search is there.
    ("SamplingOptions", "early_stopping"),
    ("SamplingOptions", "logits_processor"),  # A function of Python.
    ("SamplingOptions", "logprobs"),  # Log-probabilities are for programs, which have the Python API.
    ("LoadOptions", "quantize"),
    ("LoadOptions", "mtp"),  # --speculation loads the head where it is needed.
    ("ServeOptions", "cache_bytes"),  # --cache-gb sets it.
    ("ServeOptions", "cache_dir_bytes"),  # --cache-dir-gb sets it.
}


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one option for each field of the dataclasses among its parameters.

    If the command has a parameter with the name of a field, it gets the option, and the field keeps its default.
    """
    # Before Python 3.11, typing.get_type_hints wraps the type of a parameter with the default None into Optional.
    written = inspect.signature(command, eval_str=True).parameters.values()
    groups = {p.name: p.annotation for p in written if dataclasses.is_dataclass(p.annotation)}
    own = {p.name for p in written if p.name not in groups}
    forms = {name: _forms(group) for name, group in groups.items()}
    options = [
        option for name, group in groups.items() for option in _options(group, forms[name]) if option.name not in own
    ]
    generated = {option.name for option in options}

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        for name, group in groups.items():
            values = {f.name: arguments.pop(f.name) for f in dataclasses.fields(group) if f.name in generated}
            arguments[name] = _build(group, forms[name], values)
        command(**arguments)

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in written if p.name not in groups] + options
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _forms(group: Any) -> dict[str, _Form]:
    """The forms of all fields of a dataclass by name."""
    repeated = {
        Sequence[str]: _Form(list[str], None, tuple, []),
        Sequence[int]: _Form(list[int], "ID", tuple, []),
    }
    return {
        name: _FORMS.get(name, repeated.get(hint, _Form(hint))) for name, hint in typing.get_type_hints(group).items()
    }


def _options(group: Any, forms: Mapping[str, _Form]) -> list[inspect.Parameter]:
    found = []
    for field in dataclasses.fields(group):
        metadata = field.metadata
        if "help" not in metadata or (group.__name__, field.name) in _NOT_OPTIONS:
            continue
        form = forms[field.name]
        default = field.default if form.default is _SAME else form.default
        name = field.name.replace("_", "-")
        declared = typer.Option(
            f"--{name}/--no-{name}" if form.type is bool else f"--{name}",
            help=metadata["help"],
            metavar=metadata.get("metavar", form.metavar or _METAVARS.get(form.type)),
            envvar=metadata.get("envvar"),
            show_default=default not in (None, []),
            rich_help_panel=metadata.get("panel", _panel(group, field.name)),
        )
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[form.type, declared],
            )
        )
    return found


def _panel(group: Any, name: str) -> str | None:
    """The heading of a field in the help: that of the class which defines it."""
    owner = next(c for c in reversed(group.__mro__) if name in getattr(c, "__dataclass_fields__", ()))
    return _PANELS.get(owner.__name__)


def _build(group: Any, forms: Mapping[str, _Form], values: dict[str, Any]) -> Any:
    try:
        for name, value in values.items():
            if (parse := forms[name].parse) is not None:
                values[name] = parse(value)
        return group(**values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
