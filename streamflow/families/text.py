"""Text encoders: one or several towers, each a tokenizer with its network, and how a family puts them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streamflow.errors import InvalidRequestError
from streamflow.families.adapters import KEPT, TEXT_ENCODERS, Adapted, AdapterFiles, torch_runner
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.files import read_json
from streamflow.families.libraries import Weights, from_transformers, refused
from streamflow.types import AdapterUse, ModelCard, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from streamflow.backends.parts import OpenPart, Part, Runner

CLIP, PROJECTED_CLIP, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """A text encoder of a checkpoint.

    Attributes:
        number: 1, 2 or 3, by which diffusers names its folders.
        model: its class.
        tokens: to which prompts are padded and cut.
        call: (model, input_ids) -> what it gives, one tensor.
        output: the name of that.
    """

    number: int
    model: str
    tokens: int
    call: Callable[[Any, Tensor], Tensor]
    output: str

    @property
    def folder(self) -> str:
        return "text_encoder" if self.number == 1 else f"text_encoder_{self.number}"

    @property
    def tokenizer(self) -> str:
        return "tokenizer" if self.number == 1 else f"tokenizer_{self.number}"

    def part(self, checkpoint: Checkpoint, revision: str) -> Part:
        import torch

        from streamflow.backends.parts import ROWS, Input, Part

        tokens = Input((ROWS, self.tokens), torch.int64, below=checkpoint.config(self.folder)["vocab_size"])
        # T5 exports with this attention only; for the others it is as fast.
        options = {"attn_implementation": "eager"} if self.model == T5 else {}
        load = Weights(from_transformers, self.model, checkpoint.folder / self.folder, checkpoint.allow_pickle, options)
        return Part(self.folder, revision, {"input_ids": tokens}, self.output, load, self.call)


@dataclass(frozen=True, slots=True)
class Tower:
    """A tokenizer and what runs its network."""

    spec: TowerSpec
    tokenizer: Any
    runner: Runner

    @classmethod
    def open(cls, spec: TowerSpec, checkpoint: Checkpoint, revision: str, open_part: OpenPart) -> Tower:
        folder = checkpoint.folder / spec.tokenizer
        usual = ("T5TokenizerFast", "T5Tokenizer") if spec.model == T5 else ("CLIPTokenizer", "CLIPTokenizerFast")
        named = checkpoint.class_of(spec.tokenizer, usual[0])
        if named not in usual:
            raise InvalidRequestError("model", f"{folder}: {named}", " or ".join(usual))
        # Without any of its files the library makes one up.
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise InvalidRequestError("model", folder, "a tokenizer, with its tokenizer.json or vocabulary")
        with refused(folder):
            tokenizer = from_transformers(named).from_pretrained(folder)
        return cls(spec, tokenizer, open_part(spec.part(checkpoint, revision)))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.spec.tokens, truncation=True, return_tensors="pt"
        )
        return self.runner({"input_ids": tokens.input_ids}).cpu()

    def truncated(self, prompt: str) -> str:
        tokens = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        # The last place belongs to the end-of-text token, which a cut prompt gets too.
        cut = tokens[self.spec.tokens - 1 : -1]
        text: str = self.tokenizer.decode(cut).strip() if len(tokens) > self.spec.tokens else ""
        return text


Combine = Callable[[Sequence["Tensor"]], Mapping[str, "Tensor"]]
"""From what the towers give, [prompts, ...] each, to named conditioning [prompts, ...]."""


class PromptEncoder:
    """Implements `base.TextEncoder` with the towers of a family.

    Args:
        towers: one or more.
        combine: their outputs to the conditioning.
        empty_is_zero: an empty prompt becomes zeros.
        adapted: networks with adapters, by the folders of the towers that have any.
    """

    def __init__(
        self,
        towers: Sequence[Tower],
        combine: Combine,
        *,
        empty_is_zero: bool = False,
        adapted: Mapping[str, Adapted] | None = None,
    ) -> None:
        self._towers, self._combine, self._empty_is_zero = towers, combine, empty_is_zero
        self._adapted = adapted or {}
        self._with = lru_cache(KEPT)(self._with_adapters)
        self._longest = max(towers, key=lambda tower: tower.spec.tokens)
        self.backend = ", ".join(dict.fromkeys(tower.runner.name for tower in towers))
        self.max_tokens = self._longest.spec.tokens

    def encode(self, prompts: Sequence[str], adapters: Sequence[AdapterUse] = ()) -> list[Tensors]:
        relevant = self.relevant(adapters)
        towers = self._with(relevant) if relevant else self._towers
        combined = self._combine([tower(prompts) for tower in towers])
        rows = {name: values.numpy() for name, values in combined.items()}
        kept = [1.0 if prompt or not self._empty_is_zero else 0.0 for prompt in prompts]
        return [{name: values[k] * np.float32(kept[k]) for name, values in rows.items()} for k in range(len(prompts))]

    def relevant(self, adapters: Sequence[AdapterUse]) -> tuple[AdapterUse, ...]:
        names = frozenset[str]().union(*(adapted.names for adapted in self._adapted.values()))
        return tuple(use for use in adapters if use.changes(names))

    def truncated(self, prompt: str) -> str:
        """What no tower reads."""
        return self._longest.truncated(prompt)

    def _with_adapters(self, uses: tuple[AdapterUse, ...]) -> list[Tower]:
        return [self._tower(tower, uses) for tower in self._towers]

    def _tower(self, tower: Tower, uses: tuple[AdapterUse, ...]) -> Tower:
        adapted = self._adapted.get(tower.spec.folder)
        own = [use for use in uses if adapted and use.changes(adapted.names)]
        if adapted is None or not own:
            return tower
        return replace(tower, runner=torch_runner(tower.runner).using(adapted(own)))


def open_towers(
    specs: Sequence[TowerSpec],
    checkpoint: Checkpoint,
    card: ModelCard,
    open_part: OpenPart,
    combine: Combine,
    *,
    empty_is_zero: bool = False,
) -> PromptEncoder:
    """Args: see PromptEncoder."""
    towers = [Tower.open(spec, checkpoint, card.weights_revision, open_part) for spec in specs]
    files, adapted = AdapterFiles(card.family, checkpoint.adapters), {}
    for tower in towers if checkpoint.adapters else ():
        if tower.spec.folder in TEXT_ENCODERS:
            module = torch_runner(tower.runner).module
            adapted[tower.spec.folder] = Adapted(module, files.into(tower.spec.folder, module))
    return PromptEncoder(towers, combine, empty_is_zero=empty_is_zero, adapted=adapted)


def clip_tokens(checkpoint: Checkpoint, tokenizer: str = "tokenizer") -> int:
    """To which a CLIP tokenizer of the checkpoint pads. Raises InvalidRequestError."""
    return int(read_json(checkpoint.folder, f"{tokenizer}/tokenizer_config.json")["model_max_length"])


# -- what the networks give ------------------------------------------------------------------------------------------


def last_hidden(model: Any, input_ids: Tensor) -> Tensor:
    hidden: Tensor = model(input_ids).last_hidden_state
    return hidden


def pooled(model: Any, input_ids: Tensor) -> Tensor:
    """CLIP's state at the end of the text, [rows, width]."""
    state: Tensor = model(input_ids).pooler_output
    return state


def penultimate(model: Any, input_ids: Tensor) -> Tensor:
    """What the last layer is fed, [rows, tokens, width]."""
    hidden: Tensor = model(input_ids, output_hidden_states=True).hidden_states[-2]
    return hidden


def hidden_and_pooled(model: Any, input_ids: Tensor) -> Tensor:
    """What the last layer is fed, and the projected state at the end of the text as one token more.

    One tensor, [rows, tokens + 1, width]: the narrower of the two is filled up with zeros.
    """
    import torch
    from torch.nn.functional import pad

    given = model(input_ids, output_hidden_states=True)
    hidden, projected = given.hidden_states[-2], given.text_embeds
    width = max(hidden.shape[-1], projected.shape[-1])
    both = [pad(hidden, (0, width - hidden.shape[-1])), pad(projected, (0, width - projected.shape[-1]))[:, None]]
    return torch.cat(both, dim=1)


def split(both: Tensor, hidden_width: int, pooled_width: int) -> tuple[Tensor, Tensor]:
    """What `hidden_and_pooled` put together: [rows, tokens, hidden_width] and [rows, pooled_width]."""
    return both[:, :-1, :hidden_width], both[:, -1, :pooled_width]
