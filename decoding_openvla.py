# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""How the action tokens are decoded from the language model."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import logging

from .configuration_openvla import OpenVLAConfig


logger = logging.get_logger(__name__)


@dataclass
class SamplingParams:
    """
    How a token is drawn from its logits, as in `generate`.

    Args:
        do_sample (`bool`): Draw from the distribution instead of taking the most probable token.
        temperature (`float`), top_k (`int`), top_p (`float`): With `do_sample` only.
        generator (`torch.Generator`): Source of randomness; the global one by default.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self):
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(self.top_p))
        if warpers and not self.do_sample:
            raise ValueError("`temperature`, `top_k` and `top_p` need `do_sample=True`.")
        self.warpers = warpers

    def select(self, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Index of the chosen token for each row of `logits` (B, V), (B,), among the `allowed` ones (B, V)."""
        scores = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        check_finite(logits)
        probabilities = self.warpers(None, scores.float()).softmax(dim=-1)
        return torch.multinomial(probabilities, num_samples=1, generator=self.generator).squeeze(-1)


def check_finite(values: torch.Tensor, name: str = "logits") -> None:
    """Raise a `FloatingPointError` for what is not finite: the argmax of NaN would pass for a full-scale action."""
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"The policy's {name} are NaN or infinite. In {values.dtype} it may have overflowed (float16 does; use "
            "bfloat16 or float32), or its weights are damaged."
        )


def action_logits_function(head: nn.Module, config: OpenVLAConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Function from hidden states (..., H) to the logits of the action tokens (..., num_action_tokens), in the order of
    the ids.

    Only a plain linear layer that holds its weight can be restricted to the rows of the action tokens; a wrapped,
    quantised, hooked or offloaded one computes all rows.
    """
    rows = slice(config.action_token_begin, config.action_token_end)
    if type(head) is not nn.Linear or has_hooks(head):
        return lambda hidden: head(hidden)[..., rows]
    bias = None if head.bias is None else head.bias[rows]
    return lambda hidden: nn.functional.linear(hidden, head.weight[rows], bias)


class LibraryReader:
    """
    A language model that reads embeddings with the library's own code and growing cache, whatever model it is.

    Args:
        decoder (`nn.Module`): A causal language model without its head.
        attention_mask (`torch.Tensor`): Of the prompt, left-padded, (B, T), zero at the padding.
    """

    def __init__(self, decoder: nn.Module, attention_mask: torch.Tensor):
        self._decoder, self._mask = decoder, attention_mask
        self._cache = DynamicCache(config=decoder.config)
        self._positions = positions_of(attention_mask)  # (B, T), then of what is read

    def read(self, embeddings: torch.Tensor, num_outputs: int = 1) -> torch.Tensor:
        """Hidden states (B, num_outputs, H) of the last of `embeddings` (B, S, H), which follow what has been read."""
        batch_size, length = embeddings.shape[:2]
        if self._cache.get_seq_length():
            self._mask = torch.cat([self._mask, self._mask.new_ones(batch_size, length)], dim=1)
            steps = torch.arange(1, length + 1, device=self._positions.device)
            self._positions = self._positions[:, -1:] + steps  # (B, S)
        output = self._decoder(
            inputs_embeds=embeddings,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -num_outputs:]


class StaticReader:
    """
    A Llama that reads embeddings, with a key-value cache that is allocated once.

    It computes what the library's layers compute, with their weights, and leaves out what costs time beside that:
    masks and rotary embeddings are made once for all passes, nothing grows, no value is looked at by the host, and
    the last layer runs for the positions alone whose output is asked for. Linear layers that are wrapped or quantised
    are called as they are.

    Args:
        decoder (`nn.Module`): A Llama without its head, for which [`why_not_static`] has nothing to say.
        attention_mask (`torch.Tensor`): Of the prompt, left-padded, (B, T), zero at the padding.
        is_padded (`bool`): Whether there is any.
        capacity (`int`): Positions to make room for, the prompt's T included.
        dtype (`torch.dtype`): Of the embeddings.
    """

    def __init__(
        self,
        decoder: nn.Module,
        attention_mask: torch.Tensor,
        is_padded: bool,
        capacity: int,
        dtype: torch.dtype,
    ):
        config, batch_size, device = decoder.config, len(attention_mask), attention_mask.device
        self._head_dim = decoder.layers[0].self_attn.head_dim
        self._num_groups = config.num_attention_heads // config.num_key_value_heads
        self.layers = [_LayerFunctions(layer, capacity) for layer in decoder.layers]
        self._norm = _as_function(decoder.norm)
        self._length, self._is_padded = 0, is_padded
        positions = torch.arange(capacity, device=device)  # (C,)
        mask = (positions <= positions[:, None])[None]  # (1, C, C)
        positions = positions[None]  # (1, C)
        if is_padded:
            added = attention_mask.new_ones(batch_size, capacity - attention_mask.shape[1])
            attention_mask = torch.cat([attention_mask, added], dim=1)  # (B, C)
            # Padding sees itself: a row that sees nothing is NaN, which spreads through products with zero.
            mask = mask & attention_mask.bool()[:, None] | (positions == positions.T)  # (B, C, C)
            positions = positions_of(attention_mask)  # (B, C)
        self._mask = mask[:, None]  # (B or 1, 1, C, C)
        cos, sin = decoder.rotary_emb(torch.empty(0, dtype=dtype, device=device), positions)  # (B or 1, C, D)
        # The library turns the halves of a head and negates one; here the sign is the sine's.
        half = self._head_dim // 2
        signed_sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        self._cos, self._signed_sin = cos[:, :, None], signed_sin[:, :, None]  # (B or 1, C, 1, D)
        # Calling a wrapped layer may change it for good, and training could not use what is made in this mode.
        is_plain = all(layer.is_plain for layer in self.layers)
        self._mode = torch.inference_mode if is_plain else torch.no_grad

    def read(self, embeddings: torch.Tensor, num_outputs: int = 1) -> torch.Tensor:
        """Hidden states (B, num_outputs, H) of the last of `embeddings` (B, S, H), which follow what has been read."""
        start, end = self._length, self._length + embeddings.shape[1]
        self._length = end
        with self._mode():
            hidden = embeddings
            for layer in self.layers[:-1]:
                hidden = self._run(layer, hidden, start, start, end)
            return self._norm(self._run(self.layers[-1], hidden, start, end - num_outputs, end))

    def forget(self, num_positions: int) -> None:
        """Take back the last positions that have been read."""
        self._length -= num_positions

    def _run(self, layer: "_LayerFunctions", hidden: torch.Tensor, start: int, first: int, end: int) -> torch.Tensor:
        """One layer over the positions from `start` to `end`, (B, end - start, H) -> (B, end - first, H)."""
        normed = layer.norm(hidden)
        keys, values = self._heads(layer.key(normed)), self._heads(layer.value(normed))  # (B, S, heads, D)
        layer.store(self._rotate(keys, start, end), values, start, end)
        if first > start:
            hidden, normed = hidden[:, first - start :], normed[:, first - start :]
        query = self._rotate(self._heads(layer.query(normed)), first, end).transpose(1, 2)  # (B, heads, S, D)
        attended = self._attend(query, layer.keys[:, :, :end], layer.values[:, :, :end], first, end)
        hidden = hidden + layer.output(attended.transpose(1, 2).flatten(2))
        normed = layer.mlp_norm(hidden)
        return hidden + layer.down(layer.act(layer.gate(normed)) * layer.up(normed))

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        """(B, S, heads * D) -> (B, S, heads, D)."""
        return values.view(values.shape[0], values.shape[1], -1, self._head_dim)

    def _rotate(self, heads: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Rotary embedding of (B, S, heads, D) at these positions."""
        turned = heads.roll(self._head_dim // 2, dims=-1)
        return heads * self._cos[:, start:end] + turned * self._signed_sin[:, start:end]

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, end: int
    ) -> torch.Tensor:
        """Attention of the positions from `start` to `end` to all that are not behind them, (B, heads, S, D)."""
        if self._num_groups > 1:
            keys, values = (each.repeat_interleave(self._num_groups, dim=1) for each in (keys, values))
        attention = nn.functional.scaled_dot_product_attention
        if self._is_padded or 0 < start < end - 1:
            return attention(query, keys, values, attn_mask=self._mask[:, :, start:end, :end])
        if start == end - 1:
            return attention(query, keys, values)
        return attention(query, keys, values, is_causal=True)


class _LayerFunctions:
    """
    What a layer of a Llama computes, part by part, and its keys and values, (B, heads, C, D) each.

    Args:
        layer (`nn.Module`): A layer of a Llama.
        capacity (`int`): Positions to make room for, C.
    """

    def __init__(self, layer: nn.Module, capacity: int):
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm = _as_function(layer.input_layernorm), _as_function(layer.post_attention_layernorm)
        self.query, self.key = _as_function(attention.q_proj), _as_function(attention.k_proj)
        self.value, self.output = _as_function(attention.v_proj), _as_function(attention.o_proj)
        self.gate, self.up, self.down = (_as_function(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.act = _as_function(mlp.act_fn)
        linears = (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)
        self.is_plain = not any(isinstance(function, nn.Module) for function in linears)
        self._capacity = capacity
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def store(self, keys: torch.Tensor, values: torch.Tensor, start: int, end: int) -> None:
        """Keep keys and values (B, S, heads, D) of these positions; the first ones say of what type the cache is."""
        if self.keys is None:
            batch_size, _, num_heads, head_dim = keys.shape
            shape = (batch_size, num_heads, self._capacity, head_dim)
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, start:end] = keys.transpose(1, 2)
        self.values[:, :, start:end] = values.transpose(1, 2)


# Layers that are what `StaticReader` takes them for, and rotary embeddings that do not depend on the length so far.
_LLAMA = "transformers.models.llama.modeling_llama"
_LLAMA_PARTS = ("LlamaDecoderLayer", "LlamaAttention", "LlamaMLP")
_STATIC_ROPE_TYPES = ("default", "linear", "llama3")


def why_not_static(decoder: nn.Module, device: torch.device) -> str | None:
    """What keeps a language model without its head from [`StaticReader`] on a device; `None`: nothing does."""
    if _kind_of(decoder) != "LlamaModel":
        return f"the language model is a {_kind_of(decoder)} and not a LlamaModel"
    if decoder.config._attn_implementation != "sdpa":
        return f"the attention implementation is {decoder.config._attn_implementation!r} and not 'sdpa'"
    if decoder.rotary_emb.rope_type not in _STATIC_ROPE_TYPES:
        return f"the rotary embedding is of type {decoder.rotary_emb.rope_type!r}, which changes while it reads"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    for layer in decoder.layers:
        kinds = tuple(_kind_of(part) for part in (layer, layer.self_attn, layer.mlp))
        if kinds != _LLAMA_PARTS:
            return f"a layer is made of {kinds} and not of {_LLAMA_PARTS}"
    if decoder.training and decoder.config.attention_dropout:
        return "it is in training, with dropout"
    if any(has_hooks(part) for part in decoder.modules()):
        return "its layers have hooks (as with offloading, or on several devices), or are compiled"
    return None


def _kind_of(module: nn.Module) -> str:
    """Name of the module's class; where its code is not that of the library's Llama, with the module that has it."""
    name, source = type(module).__name__, type(module).forward.__module__
    return name if source == _LLAMA else f"{name} of {source}"


def has_hooks(module: nn.Module) -> bool:
    """
    Whether calling `module` does something beside what its class does.

    What the library leaves in its layers once hidden states were asked for does not: transformers 5 hooks that record
    nothing, 4.57 the class's own `forward`.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    is_hooked = any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)
    forward = module.__dict__.get("forward")
    is_patched = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    return is_hooked or is_patched or module._compiled_call_impl is not None


def _as_function(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `module` computes, where that is simple without the call of a module, which takes as long as a product."""
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        return lambda values: nn.functional.linear(values, weight, bias)
    if _kind_of(module) == "LlamaRMSNorm" and module.weight.dtype == torch.float32:
        weight, eps = module.weight, module.variance_epsilon

        def normalize(values: torch.Tensor) -> torch.Tensor:
            if values.dtype != torch.float32:  # the library rounds between normalising and scaling
                return module(values)
            return nn.functional.rms_norm(values, weight.shape, weight, eps)

        return normalize
    return module


def make_reader(
    decoder: nn.Module,
    attention_mask: torch.Tensor,
    max_new_tokens: int,
    dtype: torch.dtype,
    is_padded: bool | None = None,
) -> LibraryReader | StaticReader:
    """
    The fastest reader for a language model without its head.

    Args:
        decoder (`nn.Module`): A causal language model without its head.
        attention_mask (`torch.Tensor`): Of the prompt, left-padded, (B, T), zero at the padding.
        max_new_tokens (`int`): Tokens that may follow it.
        dtype (`torch.dtype`): Of the embeddings.
        is_padded (`bool`, *optional*): Whether there is padding; by default the mask is looked at.
    """
    reason = why_not_static(decoder, attention_mask.device)
    if reason is not None:
        logger.info(f"Decoding takes the library's way, since {reason}.")
        return LibraryReader(decoder, attention_mask)
    if is_padded is None:
        is_padded = not bool(attention_mask.all())
    return StaticReader(decoder, attention_mask, is_padded, attention_mask.shape[1] + max_new_tokens, dtype)


class TokenDecoder:
    """
    A language model that reads a prompt and then tokens, and gives the logits of the action tokens.

    Args:
        language_model (`nn.Module`): A causal language model.
        config (`OpenVLAConfig`): Names the action tokens.
        inputs_embeds (`torch.Tensor`): The prompt, left-padded, (B, T, H).
        attention_mask (`torch.Tensor`): (B, T), zero at the padding.
        max_new_tokens (`int`): Tokens that may follow it.
        is_padded (`bool`, *optional*): Whether there is padding; by default the mask is looked at.
    """

    def __init__(
        self,
        language_model: nn.Module,
        config: OpenVLAConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        is_padded: bool | None = None,
    ):
        self._embed = language_model.get_input_embeddings()
        self._to_action_logits = action_logits_function(language_model.get_output_embeddings(), config)
        decoder = language_model.get_decoder()
        self._reader = make_reader(decoder, attention_mask, max_new_tokens, inputs_embeds.dtype, is_padded)
        self._prompt: torch.Tensor | None = inputs_embeds  # until it is read
        self.device = inputs_embeds.device

    @property
    def can_forget(self) -> bool:
        """Whether tokens that were read can be taken back."""
        return isinstance(self._reader, StaticReader)

    def read(self, token_ids: torch.Tensor, num_outputs: int = 1) -> torch.Tensor:
        """
        Logits behind the last `num_outputs` positions.

        Args:
            token_ids (`torch.Tensor`): What is to be read next, (B, S); the first time it follows the prompt, and S
                may be 0.
            num_outputs (`int`, defaults to 1): Positions.

        Returns:
            `torch.Tensor`: (B, num_outputs, num_action_tokens), in the order of the ids, on the prompt's device.
        """
        embeddings = self._embed(token_ids)  # (B, S, H)
        if self._prompt is not None:
            embeddings, self._prompt = torch.cat([self._prompt, embeddings], dim=1), None
        logits = self._to_action_logits(self._reader.read(embeddings, num_outputs))
        return logits.to(self.device)  # a model on several devices has its head on the last one

    def forget(self, num_tokens: int) -> None:
        """Take back the last tokens that were read."""
        self._reader.forget(num_tokens)


# Tokens that are read again at once: more take longer than one, and those far behind an error are wrong.
# A GPU has time for many while it streams the weights. On two CPU cores, float32 products of 1 to 3 rows with
# 1024x2816 numbers took 0.36 ms, of 4 to 6 rows 0.65 to 0.70 ms.
_MAX_GUESSED = 16
_MAX_GUESSED_ON_CPU = 3


def decode_action_tokens(
    language_model: nn.Module,
    config: OpenVLAConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    num_tokens: int,
    sampling: SamplingParams,
    draft: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Decode action tokens with a key-value cache, restricted to the action bins: one by one, or from a draft.

    Args:
        language_model (`nn.Module`): A causal language model.
        config (`OpenVLAConfig`): Names the action tokens.
        inputs_embeds (`torch.Tensor`): The prompt, left-padded, (B, T, H).
        attention_mask (`torch.Tensor`): (B, T), zero at the padding.
        num_tokens (`int`): Tokens to decode.
        sampling (`SamplingParams`): Greedy or sampled.
        draft (`torch.Tensor`, *optional*): Action tokens that may be right, (B, num_tokens), for greedy decoding. A
            single row of few tokens without one is verified from a guess.

    Returns:
        `tuple`: Token ids (B, num_tokens), and the logits of the action tokens they were chosen from, in the order of
        the ids, (B, num_tokens, n_action_bins).

    Raises:
        FloatingPointError: If logits are not finite.
    """
    decoder = TokenDecoder(language_model, config, inputs_embeds, attention_mask, num_tokens)
    if draft is None and len(inputs_embeds) == 1 and num_tokens <= _MAX_GUESSED and not sampling.do_sample:
        # In a batch the row with the worst guess decides, and reading all tokens is no longer cheap.
        draft = guess_tokens(config, 1, num_tokens, inputs_embeds.device)
    if draft is not None and decoder.can_forget:
        token_ids, logits = _verify(decoder, config, draft)
    else:
        token_ids, logits = _decode_one_by_one(decoder, config, len(inputs_embeds), num_tokens, sampling)
    check_finite(logits)
    return token_ids, logits


def _decode_one_by_one(
    decoder: TokenDecoder, config: OpenVLAConfig, batch_size: int, num_tokens: int, sampling: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`decode_action_tokens`]; the host waits for no token, unless it is drawn from logits that it checks."""
    device = decoder.device
    token_ids, logits = [torch.empty(batch_size, 0, dtype=torch.long, device=device)], []
    for _ in range(num_tokens):
        logits.append(decoder.read(token_ids[-1]))  # (B, 1, n_action_bins)
        token_ids.append(sampling.select(logits[-1][:, 0])[:, None] + config.action_token_begin)  # (B, 1)
    return torch.cat(token_ids, dim=1), torch.cat(logits, dim=1)


def _verify(decoder: TokenDecoder, config: OpenVLAConfig, draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What greedy decoding gives, by reading a guess of all tokens at once, (B, N).

    What follows a prefix of right tokens is right: each pass makes the first wrong guess of every row right, and a
    new guess of those behind it, of which the next ones are read again (Jacobi's method). There are never more passes
    than tokens.
    """
    guess, last, action_token_begin = draft, draft.shape[1] - 1, config.action_token_begin
    num_read, most = last, _MAX_GUESSED_ON_CPU if draft.device.type == "cpu" else _MAX_GUESSED
    logits = decoder.read(guess[:, :num_read], last + 1)  # (B, N, n_action_bins)
    while True:
        token_ids = logits.argmax(dim=-1) + action_token_begin  # (B, N)
        num_right = int(count_right(guess[:, :num_read], token_ids[:, :num_read]).min())
        if num_right == last:
            return token_ids, logits
        decoder.forget(num_read - num_right)
        guess, num_read = token_ids, min(num_right + most, last)
        again = decoder.read(guess[:, num_right:num_read], num_read - num_right)
        logits = torch.cat([logits[:, : num_right + 1], again, logits[:, num_read + 1 :]], dim=1)


def guess_tokens(config: OpenVLAConfig, batch_size: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """A draft where there is none, (B, N): no movement, the middle of every bound."""
    middle = config.action_token_end - config.n_action_bins // 2
    return torch.full((batch_size, num_tokens), middle, device=device)


def count_right(draft: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Length of the prefix in which a draft is right, of each row, (B, N) -> (B,)."""
    return (draft == token_ids).long().cumprod(dim=1).sum(dim=1)


class ActionGraph:
    """
    A greedy action of fixed shapes, from pictures to tokens, in two parts that CUDA graphs can record.

    The first reads the prompt and a guess of all tokens; the second reads the tokens again that came out. It is
    repeated while they change, as in `_verify`, and each part is the same whatever it is given: there is padding in
    front of every prompt, and all tokens are read each time, since a few cost what one costs where weights are
    streamed.

    Args:
        language_model (`nn.Module`): A causal language model that [`why_not_static`] has nothing to say of.
        config (`OpenVLAConfig`): Names the action tokens.
        embed (`Callable`): From `inputs` to the embeddings of the prompt, (B, T, H), without a look at a value.
        inputs (`dict[str, torch.Tensor]`): Of the shapes to come; `input_ids` and `attention_mask` (B, T) are two of
            them.
        num_tokens (`int`): Tokens to decode.
    """

    def __init__(
        self,
        language_model: nn.Module,
        config: OpenVLAConfig,
        embed: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        inputs: dict[str, torch.Tensor],
        num_tokens: int,
    ):
        self._language_model, self._config, self._embed = language_model, config, embed
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        batch_size, device = len(inputs["attention_mask"]), inputs["attention_mask"].device
        weight = language_model.get_input_embeddings().weight
        self._guess = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
        self._token_ids = torch.zeros_like(self._guess)
        self._logits = torch.zeros(*self._guess.shape, config.n_action_bins, dtype=weight.dtype, device=device)
        self._decoder: TokenDecoder | None = None
        self._parts: list[Callable[[], None]] = [self._begin, self._go_on]
        self._lock = threading.Lock()  # all actions are in the same tensors

    @property
    def batch_size(self) -> int:
        return len(self._guess)

    @property
    def length(self) -> int:
        """Positions of the prompt, padding included."""
        return self.inputs["input_ids"].shape[1]

    @property
    def num_tokens(self) -> int:
        return self._guess.shape[1]

    def record(self) -> None:
        """Replace both parts by CUDA graphs of them."""
        with torch.cuda.device(self._guess.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._begin()
                    self._go_on()
            torch.cuda.current_stream().wait_stream(stream)
            graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
            # The stream that a capture takes by default is on the device that captured first.
            with torch.cuda.graph(graphs[0], stream=stream):
                self._begin()
            with torch.cuda.graph(graphs[1], pool=graphs[0].pool(), stream=stream):
                self._go_on()
        self._parts = [graph.replay for graph in graphs]

    def __call__(self, inputs: dict[str, torch.Tensor], draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Token ids (B, N) and logits (B, N, n_action_bins), as of [`decode_action_tokens`].

        Args:
            inputs (`dict[str, torch.Tensor]`): Of the shapes of those that this was made with; `input_ids` and
                `attention_mask` may be shorter.
            draft (`torch.Tensor`): (B, N), action tokens that may be right.
        """
        begin, go_on = self._parts
        missing = self.length - inputs["input_ids"].shape[1]
        with self._lock:
            for name, value in inputs.items():
                is_text = name in ("input_ids", "attention_mask")
                self.inputs[name].copy_(nn.functional.pad(value, (missing, 0)) if is_text else value)
            self._guess.copy_(draft)
            begin()
            while not torch.equal(self._guess[:, :-1], self._token_ids[:, :-1]):
                go_on()
            check_finite(self._logits)
            return self._token_ids.clone(), self._logits.clone()

    def _begin(self) -> None:
        """Read the prompt and the guess."""
        mask, embeddings = self.inputs["attention_mask"], self._embed(self.inputs)
        self._decoder = TokenDecoder(
            self._language_model, self._config, embeddings, mask, self.num_tokens, is_padded=True
        )
        self._keep(self._decoder.read(self._guess[:, :-1], self.num_tokens))

    def _go_on(self) -> None:
        """Read the tokens that came out in the place of the guess; the first is right and needs none."""
        self._guess.copy_(self._token_ids)
        if self.num_tokens > 1:
            self._decoder.forget(self.num_tokens - 1)
            self._keep(self._decoder.read(self._guess[:, :-1], self.num_tokens - 1))

    def _keep(self, logits: torch.Tensor) -> None:
        """Take the last logits, (B, 1..N, n_action_bins), and the tokens that they stand for."""
        self._logits[:, -logits.shape[1] :] = logits
        self._token_ids.copy_(self._logits.argmax(dim=-1) + self._config.action_token_begin)


class RecordedActions:
    """
    Actions of fixed shapes, and what they read of the model.

    Args:
        model (`nn.Module`): The policy.
        graphs (`Sequence[ActionGraph]`): Its actions, for different shapes.
    """

    def __init__(self, model: nn.Module, graphs: Sequence[ActionGraph]):
        self.graphs, self._modules = list(graphs), list(model.modules())
        self._recorded = self._identities()

    def are_of(self, model: nn.Module) -> bool:
        """Whether they read the weights of a model: it was not moved, and no tensor or module of it replaced."""
        return self._modules[0] is model and self._recorded == self._identities()

    def find(self, batch_size: int, length: int, num_tokens: int) -> ActionGraph | None:
        """The one with the least padding for prompts (B, T)."""
        fitting = [
            graph
            for graph in self.graphs
            if graph.batch_size == batch_size and graph.length >= length and graph.num_tokens == num_tokens
        ]
        return min(fitting, key=lambda graph: graph.length, default=None)

    def _identities(self) -> list[int]:
        """
        Which modules there are, and where their tensors lie. This is looked at before every action, and going through
        a list of modules takes a fifth of the time of walking the tree.
        """
        children = [id(child) for module in self._modules for child in module._modules.values()]
        tensors = [
            tensor.data_ptr()
            for module in self._modules
            for own in (module._parameters, module._buffers)
            for tensor in own.values()
            if tensor is not None
        ]
        return children + tensors


def decode_fast_tokens(
    language_model: nn.Module,
    config: OpenVLAConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    grammar: tuple[np.ndarray, np.ndarray],
    num_symbols: int,
    sampling: SamplingParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Decode FAST tokens one by one until each row spells a whole chunk, restricted to tokens that can still lead to one.

    Args:
        language_model, config, inputs_embeds, attention_mask, sampling: As in [`decode_action_tokens`].
        grammar (`tuple`): [`FastTokenizer.grammar`].
        num_symbols (`int`): Coefficients of a chunk, K * D.

    Returns:
        `tuple`: Token ids (B, S), S the most tokens of a row, with the stop token behind the shorter ones; and the
        logits of all FAST tokens, in the order of the ids, (B, S, fast_vocab_size).

    Raises:
        FloatingPointError: If logits are not finite.
    """
    # Each token spells a symbol at least, or begins one.
    decoder = TokenDecoder(language_model, config, inputs_embeds, attention_mask, 2 * num_symbols)
    device = decoder.device
    token_ids, logits = [torch.empty(len(inputs_embeds), 0, dtype=torch.long, device=device)], []
    costs, next_states = (torch.from_numpy(table).to(device) for table in grammar)  # (S, V)
    missing = torch.full((len(inputs_embeds),), num_symbols, device=device)  # (B,)
    states = torch.zeros_like(missing)
    while True:
        logits.append(decoder.read(token_ids[-1]))  # (B, 1, fast_vocab_size)
        check_finite(logits[-1])
        # A character that is begun needs one symbol more.
        fits = costs[states] + (next_states[states] > 0) <= missing[:, None]  # (B, V)
        has_ended = missing == 0
        tokens = sampling.select(logits[-1][:, 0].flip(-1), fits | has_ended[:, None])  # (B,), 0 has the last id
        chosen = (config.action_token_end - 1 - tokens).where(~has_ended, config.stop_token_id)
        token_ids.append(chosen[:, None])
        missing = missing - costs[states, tokens].where(~has_ended, 0)
        states = next_states[states, tokens].where(~has_ended, 0)
        if not missing.any():
            return torch.cat(token_ids, dim=1), torch.cat(logits, dim=1)


def left_pad(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of each row to its left, keeping the order of the tokens; both (B, T)."""
    order = attention_mask.ne(0).to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count from the first attended token of each row, (B, T)."""
    padding = attention_mask.ne(0).to(torch.uint8).argmax(dim=1, keepdim=True)  # (B, 1)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions - padding).clamp(min=0)  # (B, T)


def bidirectional_arguments(
    attention_mask: torch.Tensor, dtype: torch.dtype, attn_implementation: str
) -> dict[str, torch.Tensor | bool | None]:
    """
    Arguments of a decoder with which every token sees every other that is not padding.

    A mask for each query and key is taken as it is by every implementation of attention but the flash ones. Those
    know padding alone, and follow `is_causal`, which the decoder's layers pass on to them.

    Args:
        attention_mask (`torch.Tensor`): (B, T), zero at the padding.
        dtype (`torch.dtype`): Of the embeddings.
        attn_implementation (`str`): `sdpa`, `eager`, `flash_attention_2`, ...

    Returns:
        `dict`: `attention_mask`, (B, 1, T, T), or (B, T) or `None` for flash attention; and `is_causal`.
    """
    if "flash" in attn_implementation:
        return {"attention_mask": None if attention_mask.all() else attention_mask, "is_causal": False}
    length = attention_mask.shape[1]
    visible = attention_mask.bool()[:, None, None].expand(-1, 1, length, -1)  # (B, 1, T, T)
    if attn_implementation != "sdpa":  # the others add the mask to their scores
        hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return {"attention_mask": hidden.masked_fill(~visible, torch.finfo(dtype).min), "is_causal": False}
    return {"attention_mask": visible, "is_causal": False}


def check_attention(
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], embeddings: torch.Tensor, attention_mode: str
) -> None:
    """
    See what each position sees, by changing the last token, and the padding in front: without padding, as single
    prompts are, and with it, since implementations treat them differently.

    Args:
        decode (`Callable`): From embeddings (B, T, H) and mask (B, T) to hidden states (B, T, H).
        embeddings (`torch.Tensor`): Of T + 1 different tokens, (T + 1, H).
        attention_mode (`str`): What is expected, `causal` or `bidirectional`.

    Raises:
        RuntimeError: If other positions change than should.
    """
    row, other = embeddings[:-1], embeddings[-1:]  # (T, H), (1, H)
    rows = torch.stack([row, row, torch.cat([row[:-1], other]), torch.cat([other, row[1:]])])  # (4, T, H)
    mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
    padded = mask.clone()
    padded[:, 0] = 0

    def changed(hidden: torch.Tensor) -> list[list[bool]]:
        change = (hidden[1:].float() - hidden[0].float()).abs().amax(dim=-1)  # (rows - 1, positions)
        # The same row twice: what differs there is rounding.
        return (change[1:] > 10 * change[0].max()).tolist()

    (by_last,) = changed(decode(rows[:3], mask[:3]))
    by_last_padded, by_padding = changed(decode(rows, padded)[:, 1:])
    expected = [attention_mode == "bidirectional"] * (len(row) - 1) + [True]
    if (by_last, by_last_padded, by_padding) != (expected, expected[1:], [False] * (len(row) - 1)):
        raise RuntimeError(
            f"The language model's attention is not {attention_mode}, as the configuration says. Positions that "
            f"changed with the last token: {by_last}, with padding in front {by_last_padded}; with the padding: "
            f"{by_padding}. The attention implementation does not follow the mask; set another one, such as "
            "`attn_implementation='sdpa'`."
        )
