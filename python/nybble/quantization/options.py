"""Options of `nybble.quantize`, defined once for Python and for the command line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from nybble.overrides import chosen, doc
from nybble.quantization.spec import FORMATS, PATTERNS, RECIPES, Format, Recipe, SparsityPattern

if TYPE_CHECKING:
    from typing_extensions import Unpack

CALIBRATION_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Options of `nybble.quantize`, which also takes each of them by name.

    Example:
        ```python
        options = QuantizeOptions(recipe="gptq", group=128)
        report = nybble.quantize("org/model", "model.gguf", options)
        same = nybble.quantize("org/model", "model.gguf", recipe="gptq", group=128)
        ```

    Raises:
        ValueError: An option is out of range, or contradicts another.
    """

    recipe: Recipe = field(
        default="auto",
        metadata={
            **doc(
                "How to choose codes: rtn, gptq, gptq+tune, awq, awq+gptq or signround; auto tries recipes, cheapest "
                "first, until one meets --target."
            ),
            "metavar": "RECIPE",
        },
    )
    """How to choose codes.

    - `"rtn"`: rounding to nearest.
    - `"gptq"`, `"awq"`, `"awq+gptq"`, `"signround"`: rounding that preserves layer outputs on the calibration text.
    - `"gptq+tune"`: gptq, then tuning of scales and norms. For models of plain decoder blocks, such as Llama's.
    - `"auto"`: tries rtn, gptq, and gptq+tune or awq+gptq, until one meets `target`; otherwise takes the best.
    """
    search: bool = True
    """Search for the best scale of each group. False takes the scale that fits the largest weight."""
    group: int | None = field(
        default=None,
        metadata={
            **doc("Weights that share a scale: 32, 64, 128, or 0 for whole rows; 32 if not given."),
            "metavar": "SIZE",
        },
    )
    """Weights that share a scale: a multiple of 32, or 0 for whole rows. None is 32.

    The group is halved for rows that it does not divide.
    """
    symmetric: bool | None = None
    """True for codes around 0 (q4_0), False for a minimum per group (q4_1). `format` includes this choice."""
    format: Format | None = field(
        default=None,
        metadata={
            **doc(
                "Block format of linear layers: q2_0, q4_0, q4_1 or iq4_nl; q4_0 if not given, iq4_nl with the recipe "
                "auto, q2_0 with fewer than 4.5 --bits-per-weight."
            ),
            "metavar": "FORMAT",
        },
    )
    """Block format of linear layers.

    Without it and `symmetric` it is q4_0, and iq4_nl for "auto", with two exceptions: a layer that the source has in 4
    bits gets the format that holds it exactly, and "auto" gives each layer the format that changes its outputs least.
    With fewer than 4.5 `bits_per_weight` it is q2_0. A layer whose rows do not fill q2_0's blocks of 64 weights is
    stored in iq4_nl.
    """
    bits_per_weight: float | None = field(
        default=None,
        metadata={
            **doc("Mean bits of the weights of linear layers, 2.25 to 8.5; the most sensitive layers get more."),
            "metavar": "BITS",
        },
    )
    """Bits per weight, as a mean over all linear layers: 2.25 to 8.5, scales included.

    The most sensitive layers get 5 or 8 bits, the others 4. Below 4.5, they get 4, 5 or 8 bits, and the others 2. With
    the recipe "auto", linear layers also get the bits that the embedding and the output leave: see `output_type`.
    """
    sparsity: float | None = field(
        default=None,
        metadata={**doc("Set this share of the weights of linear layers to zero, such as 0.5."), "metavar": "SHARE"},
    )
    """The share of the weights of linear layers that become zero.

    The weights that change the outputs of their layer least are pruned. Needs the format q4_0, which has a code for
    zero. Where that was measured to be faster, nybble reads fewer bytes of such files.
    """
    sparsity_pattern: SparsityPattern | None = field(
        default=None,
        metadata={
            **doc("Which weights may be zero: unstructured, or 2:4 for two of every four; unstructured if not given."),
            "metavar": "PATTERN",
        },
    )
    """Which weights may become zero: any of a row ("unstructured", the default), or two of every four ("2:4")."""
    output_type: str | None = field(
        default=None,
        metadata={
            **doc(
                "Block type of the embedding and the output. If not given, q8_0; the recipe auto chooses the types "
                "with which a file of the same size loses least."
            ),
            "metavar": "TYPE",
        },
    )
    """Block type of the embedding and the output. None is q8_0, except for the recipe "auto".

    With "auto", no `format` and no `sparsity`, or with `bits_per_weight`, each gets iq4_nl, q5_0 or q8_0. The bytes
    that they leave, compared with q8_0, go to the most sensitive linear layers, where the file loses less that way.
    """
    keep: Mapping[str, str] | None = None
    """Block types of single tensors, by name or pattern: `{"blk.0.*": "q8_0"}`. The first matching pattern applies."""
    prune_experts: int | None = field(
        default=None,
        metadata={
            **doc("Keep this many experts of each layer: those that the calibration text uses most."),
            "metavar": "N",
        },
    )
    """Keep this many experts of each layer: those that most tokens of the calibration text choose."""
    calibration: str | os.PathLike[str] | Sequence[str | Mapping[str, Any]] = "sample"
    """The calibration text.

    A file (prose, JSON, JSON Lines or Parquet), a list of documents, `"sample"` for the short text in the package, or
    `"self"` for text that the model generates. A record of JSON or Parquet has a text, or a conversation
    (`{"messages": [...]}`, `{"conversations": [...]}`, `{"prompt": ..., "completion": ...}`), which the model's chat
    template writes out.
    """
    calibration_tokens: int = field(
        default=CALIBRATION_TOKENS, metadata={**doc("Tokens of the calibration text to use."), "metavar": "N"}
    )
    """Tokens of the calibration text to use."""
    imatrix: str | os.PathLike[str] | None = None
    """An `imatrix.gguf` or `imatrix.dat` file of llama.cpp: the importance of columns, for layers that are rounded
    without calibration.

    These are all layers for "rtn", and experts that too few tokens reach. A file that does not exist is measured on the
    calibration text and written.
    """
    evaluation: str | os.PathLike[str] | Sequence[str | Mapping[str, Any]] | None = None
    """The text to measure on: a file or a list of documents. None holds out a part of the calibration text."""
    measure: bool | None = None
    """Compare the output with the source. None does so if `evaluation` is given; "auto" always does."""
    target: float | None = None
    """"auto" ends when the perplexity exceeds the source's by at most this share, and the mean KL divergence is at most
    three times the share; 0.01 if None."""
    budget: float | None = field(
        default=None, metadata={**doc("Minutes after which auto tries no other recipe."), "metavar": "MINUTES"}
    )
    """Minutes after which "auto" tries no other recipe. The first recipe is always tried."""
    seed: int = field(
        default=0,
        metadata={**doc("Seed of generated calibration text and of the order of tuning."), "metavar": "N"},
    )
    """Seed of random choices.

    They are the generated calibration text (`calibration="self"`) and the order in which gptq+tune uses the windows.
    Other recipes make none. The same seed gives the same file on any number of threads.
    """
    threads: int | None = field(
        default=None, metadata=doc("Threads to compute with; the number of physical cores if not given.")
    )
    """Number of threads. None takes the number of physical cores available to this process."""
    revision: str | None = field(default=None, metadata=doc("Branch, tag or commit of a repository.", "NAME"))
    """Branch, tag or commit of a Hub repository."""
    force: bool = False
    """Overwrite an existing output."""

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: found {self.recipe!r}, expected one of {', '.join(RECIPES)}")
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format: found {self.format!r}, expected one of {', '.join(FORMATS)}")
        if None not in (self.format, self.symmetric) and self.symmetric != (self.format != "q4_1"):
            raise ValueError(
                f"symmetric: found {self.symmetric} with the format {self.format}, expected only one of the two"
            )
        if self.group is not None and (self.group < 0 or self.group % 32):
            raise ValueError(f"group: found {self.group}, expected a multiple of 32, or 0 for whole rows")
        if self.bits_per_weight is not None and not 2.25 <= self.bits_per_weight <= 8.5:
            raise ValueError(f"bits_per_weight: found {self.bits_per_weight}, expected 2.25 to 8.5, scales included")
        if self.sparsity is not None and not 0 < self.sparsity <= 0.95:
            raise ValueError(f"sparsity: found {self.sparsity}, expected a share above 0 and up to 0.95")
        if self.sparsity is not None and self.block_format != "q4_0":
            raise ValueError(f"format: found {self.block_format} with sparsity, expected q4_0, which has a zero")
        if self.sparsity_pattern is not None:
            if self.sparsity_pattern not in PATTERNS:
                found = repr(self.sparsity_pattern)
                raise ValueError(f"sparsity_pattern: found {found}, expected one of {', '.join(PATTERNS)}")
            if self.sparsity is None:
                raise ValueError(f"sparsity_pattern: found {self.sparsity_pattern}, expected it with sparsity only")
            if self.sparsity_pattern == "2:4" and self.sparsity != 0.5:
                raise ValueError(f"sparsity: found {self.sparsity}, expected 0.5 with the pattern 2:4")
        if self.prune_experts is not None and not 1 <= self.prune_experts < 2**32:
            raise ValueError(f"prune_experts: found {self.prune_experts}, expected a number of experts")
        if self.target is not None and not 0 < self.target < 1:
            raise ValueError(f"target: found {self.target}, expected a share of the perplexity such as 0.01")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget: found {self.budget}, expected a number of minutes above 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: found {self.seed}, expected 0 to 2**64 - 1")
        for name in ("target", "budget"):
            if getattr(self, name) is not None and self.recipe != "auto":
                found = f"{getattr(self, name)} with the recipe {self.recipe}"
                raise ValueError(f"{name}: found {found}, expected it with the recipe auto only")

    @property
    def block_format(self) -> Format:
        """The block format of linear layers."""
        if self.format is not None or self.symmetric is False:
            return self.format or "q4_1"
        if self._is_below_4_bits and self.symmetric is None:
            return "q2_0"
        return "iq4_nl" if self.recipe == "auto" and self.sparsity is None else "q4_0"

    @property
    def _is_below_4_bits(self) -> bool:
        return self.bits_per_weight is not None and self.bits_per_weight < 4.5

    @property
    def chooses_format(self) -> bool:
        """Whether linear layers may differ in format: to be held exactly or, with "auto", for a smaller error."""
        is_open = self.format is None and self.symmetric is None
        return is_open and self.sparsity is None and not self._is_below_4_bits

    @property
    def chooses_output(self) -> bool:
        """Whether the types of the embedding and the output are chosen so that a file of the same size loses least."""
        is_open = self.recipe == "auto" and self.output_type is None and self.sparsity is None
        return is_open and (self.bits_per_weight is not None or self.chooses_format)

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return 32 if self.group is None else self.group

    @property
    def measures(self) -> bool:
        """Whether the output is compared with the source."""
        if self.recipe == "auto" or self.measure is None:
            return self.recipe == "auto" or self.evaluation is not None
        return self.measure

    @property
    def needs_text(self) -> bool:
        """Whether a calibration text is needed."""
        holds_out = self.measures and self.evaluation is None
        measures_importance = self.imatrix is not None and not Path(self.imatrix).exists()
        counts = self.bits_per_weight is not None or self.prune_experts is not None
        return self.recipe != "rtn" or holds_out or counts or measures_importance

    def replace(self, **overrides: Unpack[QuantizeOverrides]) -> QuantizeOptions:
        """Returns a copy with some options changed."""
        return dataclasses.replace(self, **overrides)


class QuantizeOverrides(TypedDict, total=False):
    """Names and types of the fields of `QuantizeOptions`, for type checkers."""

    recipe: Recipe
    search: bool
    group: int | None
    symmetric: bool | None
    format: Format | None
    bits_per_weight: float | None
    sparsity: float | None
    sparsity_pattern: SparsityPattern | None
    output_type: str | None
    keep: Mapping[str, str] | None
    prune_experts: int | None
    calibration: str | os.PathLike[str] | Sequence[str | Mapping[str, Any]]
    calibration_tokens: int
    imatrix: str | os.PathLike[str] | None
    evaluation: str | os.PathLike[str] | Sequence[str | Mapping[str, Any]] | None
    measure: bool | None
    target: float | None
    budget: float | None
    seed: int
    threads: int | None
    revision: str | None
    force: bool


def merge_quantize_options(options: QuantizeOptions | None, overrides: QuantizeOverrides) -> QuantizeOptions:
    """Returns `options`, or the defaults, with single options replaced.

    Raises:
        TypeError: `options` is of another type, or an override is not an option. The message lists the options.
    """
    return chosen(QuantizeOptions, options, overrides)
