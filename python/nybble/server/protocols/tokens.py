"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM and llama-server have them."""

from __future__ import annotations

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.generation.request import check_length
from nybble.server.errors import as_api_errors
from nybble.server.protocols.messages import Message
from nybble.server.protocols.schema import TokenId
from nybble.server.protocols.strict import Off, On, Strict
from nybble.server.service import Service
from nybble.tokenizer.tokenizer import Tokenizer


class TokenizeRequest(Strict):
    """`POST /tokenize`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = Field(default=None, description="Another name of prompt, as with llama-server.")
    messages: list[Message] | None = Field(
        default=None, min_length=1, max_length=4096, description="A conversation for the chat template, not a prompt."
    )
    add_generation_prompt: bool | None = Field(default=None, description="true unless it is given.")
    add_special_tokens: bool | None = Field(
        default=None,
        description="Whether to add the start token that the model expects. By default true for a prompt, "
        "and false for content and messages, as with vLLM and llama-server.",
    )
    add_special: bool | None = Field(default=None, description="Another name of add_special_tokens.")
    parse_special: On | None = None
    return_token_strs: bool | None = None
    with_pieces: Off | None = None

    @model_validator(mode="after")
    def _check_text(self) -> TokenizeRequest:
        given = [name for name in ("prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "neither of them"
            raise PydanticCustomError(
                "invalid", "prompt: found {found}, expected one of prompt, content and messages", {"found": found}
            )
        return self

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The token ids."""
        text = self.text(tokenizer)
        adds = self.add_special if self.add_special_tokens is None else self.add_special_tokens
        adds = self.prompt is not None if adds is None else adds
        return tokenizer.encode_prompt(text) if adds else tokenizer.encode(text, add_special=False)

    def text(self, tokenizer: Tokenizer) -> str:
        """The text to encode."""
        if self.messages is None:
            return self.content or "" if self.prompt is None else self.prompt
        return tokenizer.apply_chat_template(
            [message.for_template() for message in self.messages],
            add_generation_prompt=self.add_generation_prompt is not False,
        )


class Tokens(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=2**20)


class Text(BaseModel):
    """The text of tokens, special tokens spelled out. Both names hold it."""

    prompt: str
    content: str


class TokenizerInfo(BaseModel):
    """The special tokens and the chat template of the tokenizer."""

    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    chat_template: str | None


async def tokenize(service: Service, body: TokenizeRequest) -> Tokens:
    """Answers `/tokenize`.

    Raises:
        ApiError: The model is another one, or the text is too long.
    """
    service.admit(body.model, 0)
    model = service.engine.model

    def compute() -> list[int]:
        check_length(model, body.text(model.tokenizer))
        return body.ids(model.tokenizer)

    with as_api_errors("messages" if body.messages else "prompt"):
        ids = await service.in_thread(compute)
    texts = [_spelled(model.tokenizer, token) for token in ids] if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=model.info.context, tokens=ids, token_strs=texts)


async def detokenize(service: Service, body: DetokenizeRequest) -> Text:
    """Answers `/detokenize`.

    Raises:
        ApiError: The model is another one, or a token is unknown.
    """
    service.admit(body.model, 0)
    tokenizer = service.engine.model.tokenizer

    def compute() -> str:
        parts: list[str] = []
        run: list[int] = []
        for token in body.tokens:
            if token not in tokenizer.special_ids:
                run.append(token)
                continue
            parts += [tokenizer.decode(run), tokenizer.token_text(token)]
            run = []
        return "".join([*parts, tokenizer.decode(run)])

    with as_api_errors("tokens"):
        text = await service.in_thread(compute)
    return Text(prompt=text, content=text)


def tokenizer_info(service: Service) -> TokenizerInfo:
    """Answers `/tokenizer_info`."""
    tokenizer = service.engine.model.tokenizer

    def spelled(token: int | None) -> str | None:
        return None if token is None else tokenizer.token_text(token)

    return TokenizerInfo(
        bos_token=spelled(tokenizer.bos_id),
        eos_token=spelled(tokenizer.eos_id),
        vocab_size=tokenizer.vocab_size,
        chat_template=tokenizer.chat_templates.get("default"),
    )


def _spelled(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_text(token) if token in tokenizer.special_ids else tokenizer.decode([token])
