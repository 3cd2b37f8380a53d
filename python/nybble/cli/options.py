"""Options of the commands, made from the dataclasses that define them, so that no option is written down twice."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nybble.sampling import SamplingOptions

if typing.TYPE_CHECKING:
    from nybble.model import Model


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of every command that loads a model."""

    filename: str | None = field(
        default=None, metadata={"help": 'Which GGUF file of a folder or repository, such as "*Q4_K_M.gguf".'}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a repository."})
    kernel: str | None = field(
        default=None, metadata={"help": "Instruction set to compute with; the best if not given."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; the physical cores if not given."}
    )
    context: int | None = field(default=None, metadata={"help": "Tokens to hold; the model's own limit if not given."})
    cache_type: Literal["f16", "int8", "f32"] | None = field(
        default=None, metadata={"help": "How the tokens seen are stored; int8 takes half the memory of f16."}
    )

    mmap: bool = field(
        default=True,
        metadata={"help": "Map files while they load; without, they are read, which bears that somebody changes them."},
    )

    def load(self, source: str | None, *, quantize: str | None = "auto") -> Model:
        """Loads a model, with a progress bar where that takes long; `quantize` is that of `Model.load`."""
        from nybble.cli import terminal
        from nybble.model import Model

        terminal.show_log()
        # A vocabulary is some hundred thousand objects that all stay: looking through them for garbage again and again
        # takes a tenth of the time to the first token.
        gc.disable()
        try:
            return Model.load(source, quantize=quantize, **dataclasses.asdict(self))
        finally:
            gc.enable()


_PANELS: dict[type, str] = {LoadOptions: "Model", SamplingOptions: "Sampling"}
# Log-probabilities are for programs, which have the Python API.
_HIDDEN = {"logprobs"}


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one option for each field of its `LoadOptions` and `SamplingOptions` parameters.

    A field that the command has a parameter of its own for is left to it, and keeps its default.
    """
    # typing.get_type_hints would wrap what has None for a default into an Optional before Python 3.11.
    written = inspect.signature(command, eval_str=True).parameters.values()
    groups = {p.name: p.annotation for p in written if p.annotation in _PANELS}
    own = {p.name for p in written if p.name not in groups}
    options = [option for group in groups.values() for option in _options(group) if option.name not in own]
    taken = {option.name for option in options}

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        for name, group in groups.items():
            values = {f.name: arguments.pop(f.name) for f in dataclasses.fields(group) if f.name in taken}
            arguments[name] = _build(group, values)
        command(**arguments)

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in written if p.name not in groups] + options
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _options(group: type) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group)
    found = []
    for option in dataclasses.fields(group):
        if option.name in _HIDDEN:
            continue
        kind, default, metavar = hints[option.name], option.default, None
        if option.name == "logit_bias":
            kind, default, metavar = list[str], [], "ID=BIAS"
        elif option.name == "stop":
            kind, default, metavar = list[str], [], "TEXT"
        elif option.name in ("schema", "grammar"):
            kind, metavar = str | None, "TEXT|@FILE"
        elif option.name == "max_tokens":
            kind = int  # "None" has no form on a command line; a number larger than the context does the same.
        name = option.name.replace("_", "-")
        declared = typer.Option(
            f"--{name}/--no-{name}" if kind is bool else f"--{name}",
            help=option.metadata["help"],
            metavar=metavar,
            show_default=default not in (None, []),
            rich_help_panel=_PANELS[group],
        )
        found.append(
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
            )
        )
    return found


def _build(group: type, values: dict[str, Any]) -> Any:
    try:
        if "logit_bias" in values:
            values["logit_bias"] = _biases(values["logit_bias"])
        for name in ("schema", "grammar"):
            if (text := values.get(name)) is not None and text.startswith("@"):
                values[name] = _read(name, Path(text[1:]))
        return group(**values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read(name: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{name}: {file}: {error}, expected a text file") from None


def _biases(texts: list[str]) -> Mapping[int, float]:
    biases = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise ValueError(f"logit_bias: found {text!r}, expected ID=BIAS, such as 42=-inf") from None
    return biases
