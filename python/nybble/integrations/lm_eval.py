"""Evaluates models by the tasks of lm-evaluation-harness: `pip install 'nybble[lm-eval]'`.

Importing this module registers the model `nybble`. `python -m nybble.integrations.lm_eval` is the command of
lm-evaluation-harness with this model:

    python -m nybble.integrations.lm_eval run --model nybble --model_args pretrained=model.gguf --tasks hellaswag
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nybble.generation.scoring import logprob_rows
from nybble.integrations import _needs
from nybble.model import Model
from nybble.sampling import SamplingOptions

try:
    from lm_eval.api import model as harness
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as _error:
    raise _needs("lm_eval", _error) from None

# The harness's own types are not named, so that programs without it can check theirs.
if TYPE_CHECKING:
    _Base = object
else:
    _Base = harness.TemplateLM

__all__ = ["NybbleLM"]

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names under which tasks limit the number of tokens, in the order in which they count."""
_ANY_TOKEN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Tasks that sample expect the model's own distribution unless they say otherwise."""
_BATCH = 64
"""Generations between two updates of the harness's cache. The scheduler decides how many run together."""

Tokens = Sequence[int]


@register_model("nybble")
class NybbleLM(_Base):
    """A model of nybble for lm-evaluation-harness.

    Args:
        pretrained: The model, as in `Model.load`; or a model that is loaded already.
        max_length: The largest number of tokens of a request; None for the model's context.
        max_gen_toks: The largest number of tokens of a generation, for tasks that do not say it.
        add_bos_token: Put the start token before each request; None does so if the model was trained with it.
        prefix_token_id: The token before requests that have no context; None for the start token, or the end token if
            the model has no start token.
        seed: The seed of tasks that sample.
        device: Ignored: nybble runs on the CPU. The command of the harness passes "cuda:0" by default.
        batch_size: Ignored: results do not depend on it, and the scheduler chooses it.
        max_batch_size: Ignored.
        **load: Other arguments of `Model.load`, such as `threads=8`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        ```python
        import lm_eval
        from nybble.integrations.lm_eval import NybbleLM

        results = lm_eval.simple_evaluate(NybbleLM("model.gguf"), tasks=["arc_easy"])
        ```
    """

    cache_hook: Any
    """Set by the harness."""

    def __init__(
        self,
        pretrained: str | Model | None = None,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 1234,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **load: Any,
    ) -> None:
        super().__init__()
        self.model: Model = (
            pretrained if isinstance(pretrained, Model) else Model.load(pretrained, **{"progress": False, **load})
        )
        context = self.model.info.context
        if max_length is not None and not 1 < max_length <= context:
            raise ValueError(f"max_length: found {max_length}, expected 2 to {context}, the context of the model")
        self.max_length: int = max_length or context
        self.max_gen_toks: int = max_gen_toks
        self.add_bos_token: bool | None = add_bos_token
        self.seed: int = seed
        self._prefix_token_id = prefix_token_id

    # --- Tokens -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.model.tokenizer.eos_id
        return self.prefix_token_id if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """The token before prompts that have no context."""
        tokenizer = self.model.tokenizer
        for token in (self._prefix_token_id, tokenizer.bos_id, tokenizer.eos_id):
            if token is not None:
                return token
        raise ValueError("prefix_token_id: found None, expected a token, as the model has no start and no end token")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of a text, with the start token if the model, `add_bos_token` or the argument asks for it."""
        tokenizer = self.model.tokenizer
        starts = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if starts is None:
            return tokenizer.encode_prompt(string)
        ids = tokenizer.encode(string, add_special=False)
        if starts and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            return [tokenizer.bos_id, *ids]
        return ids

    # --- Chat ---------------------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Names the model in the harness's caches of requests."""
        return str(self.model.info.file)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template that `apply_chat_template` uses, for the harness's log; None if it uses none."""
        if chat_template is False or chat_template is None:
            return None
        return self._template(chat_template)[1]

    def _template(self, wanted: bool | str) -> tuple[str, str]:
        templates = self.model.tokenizer.chat_templates
        name = wanted if isinstance(wanted, str) else "default"
        if name not in templates:
            listed = ", ".join(sorted(templates)) or "none"
            raise ValueError(f"apply_chat_template: found {name!r}, expected a chat template of the model ({listed})")
        self._chosen_template = name
        return name, templates[name]

    _chosen_template: str | None = None

    report: Callable[[int, int], object] | None = None
    """Called with the number of requests of a kind that are done, and their total, instead of a bar of tqdm."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Writes a conversation as a prompt. Without a generation prompt, the last message is continued."""
        template = self._chosen_template
        apply = self.model.tokenizer.apply_chat_template
        text = apply(chat_history, add_generation_prompt=add_generation_prompt, template=template)
        if add_generation_prompt or not chat_history:
            return text
        # The last message is the beginning of the answer: what the template writes behind it is cut off.
        begun = str(chat_history[-1].get("content", "")).strip()
        at = text.rfind(begun)
        return text if at < 0 else text[: at + len(begun)]

    # --- Requests -----------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Tokens, Tokens]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether each of its tokens is the likeliest one."""
        # Continuations of one token often share their context, which is then computed once.
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_key, context, continuation) in enumerate(requests):
            groups.setdefault((*context, *continuation)[:-1], []).append(index)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for computed, members in self._progress(groups.items(), "loglikelihood", disable_tqdm):
            longest = max(len(requests[index][2]) for index in members)
            if longest > self.max_length:
                raise ValueError(
                    f"a continuation has {longest} tokens, expected at most {self.max_length}, the context of the model"
                )
            # The harness cuts contexts from the left.
            ids = computed[-self.max_length :]
            rows = [*logprob_rows(self.model, ids, max(len(ids) - longest, 0))] if longest else []
            for index in members:
                key, _context, continuation = requests[index]
                scored = [*zip(rows[len(rows) - len(continuation) :], continuation, strict=True)]
                total = sum(float(row[token]) for row, token in scored)
                found[index] = (total, all(int(row.argmax()) == token for row, token in scored))
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[index])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole documents, in windows of the context that do not overlap in what they predict."""
        found = []
        for request in self._progress(requests, "loglikelihood_rolling", disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(logprob for logprob, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to a stop string, the end of the text or the limit of tokens."""
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        with self._bar(len(requests), "generate_until", disable_tqdm) as update:
            for members in groups.values():
                options = self._options(requests[members[0]].args[1])
                for start in range(0, len(members), _BATCH):
                    batch = members[start : start + _BATCH]
                    prompts = [self._prompt(requests[index].args[0], options) for index in batch]
                    for index, completion in zip(batch, self.model.generate(prompts, options), strict=True):
                        found[index] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, completion.text)
                        update()
        return [found[index] for index in range(len(requests))]

    def _options(self, given: Mapping[str, Any]) -> SamplingOptions:
        """The options of a task's generations.

        Raises:
            TypeError: An option is unknown.
            ValueError: An option is out of range.
        """
        options = dict(given)
        limits = [limit for name in _LIMITS if (limit := options.pop(name, None)) is not None]
        limit = int(limits[0]) if limits else self.max_gen_toks
        if not 0 < limit < self.max_length:
            raise ValueError(
                f"max_gen_toks: found {limit}, expected 1 to {self.max_length - 1}, the context of the model"
            )
        until = options.pop("until", None) or []
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        samples = options.pop("do_sample", None)
        temperature = options.pop("temperature", 1.0 if samples else 0.0)
        options["temperature"] = 0.0 if samples is False else float(temperature)
        return SamplingOptions(**{**_ANY_TOKEN, "seed": self.seed, **options}, stop=stop, max_tokens=limit)

    def _prompt(self, context: str, options: SamplingOptions) -> list[int]:
        """The tokens of a context, cut from the left so that the generation fits."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return ids[-(self.max_length - (options.max_tokens or 0)) :]

    def _progress(self, items: Any, name: str, disabled: bool) -> Iterator[Any]:
        with self._bar(len(items), name, disabled) as update:
            for item in items:
                yield item
                update()

    @contextlib.contextmanager
    def _bar(self, total: int, name: str, disabled: bool) -> Iterator[Callable[[], object]]:
        """Shows a bar, or calls `report`, while requests are computed. What it returns is to be called after each."""
        if self.report is None or disabled:
            with tqdm(total=total, desc=name, disable=disabled) as bar:
                yield bar.update
            return
        report, done = self.report, itertools.count(1)
        report(0, total)
        yield lambda: report(next(done), total)


def evaluate(
    lm: NybbleLM, tasks: Sequence[str], manager: Any, *, limit: int | None = None, bootstrap: int = 100
) -> Mapping[str, Any]:
    """Returns what the harness finds out about a model in some tasks.

    Args:
        lm: The model.
        tasks: Names of tasks.
        manager: The harness's `TaskManager` that knows them.
        limit: Use only the first documents of each task.
        bootstrap: Resamplings for the errors of metrics that are not means.
    """
    import lm_eval

    found: Mapping[str, Any] = lm_eval.simple_evaluate(
        lm, tasks=[*tasks], task_manager=manager, limit=limit, bootstrap_iters=bootstrap, log_samples=False
    )
    return found


def main() -> None:
    """Runs the command of lm-evaluation-harness, which knows the model `nybble` now."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
