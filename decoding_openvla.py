# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""How the action tokens are decoded from the language model."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .configuration_openvla import OpenVLAConfig


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
    Function from hidden states (B, H) to the logits of the action tokens (B, num_action_tokens), in the order of the
    ids.

    Only a plain linear layer that holds its weight can be restricted to the rows of the action tokens; a wrapped,
    quantised or offloaded one computes all rows.
    """
    rows = slice(config.action_token_begin, config.action_token_end)
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        return lambda hidden: head(hidden)[:, rows]
    bias = None if head.bias is None else head.bias[rows]
    return lambda hidden: nn.functional.linear(hidden, head.weight[rows], bias)


class TokenDecoder:
    """
    A language model that reads token after token, with a key-value cache.

    Args:
        language_model (`nn.Module`): A causal language model.
        config (`OpenVLAConfig`): Names the action tokens.
        inputs_embeds (`torch.Tensor`): The prompt, left-padded, (B, T, H).
        attention_mask (`torch.Tensor`): (B, T), zero at the padding.
    """

    def __init__(
        self,
        language_model: nn.Module,
        config: OpenVLAConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
    ):
        self.decoder, self.embed = language_model.get_decoder(), language_model.get_input_embeddings()
        self.to_action_logits = action_logits_function(language_model.get_output_embeddings(), config)
        self.cache = DynamicCache(config=language_model.config)
        self.inputs_embeds, self.attention_mask = inputs_embeds, attention_mask
        self.position_ids = positions_of(attention_mask)  # (B, T)

    def next_logits(self) -> torch.Tensor:
        """Logits of the action tokens behind what has been read, in the order of the ids, (B, num_action_tokens)."""
        output = self.decoder(
            inputs_embeds=self.inputs_embeds,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.to_action_logits(output.last_hidden_state[:, -1])

    def append(self, token_ids: torch.Tensor) -> None:
        """Take one more token (B,) to be read."""
        self.inputs_embeds = self.embed(token_ids[:, None])  # (B, 1, H)
        ones = self.attention_mask.new_ones(len(self.attention_mask), 1)
        self.attention_mask = torch.cat([self.attention_mask, ones], dim=1)
        self.position_ids = self.position_ids[:, -1:] + 1  # (B, 1)


def decode_action_tokens(
    language_model: nn.Module,
    config: OpenVLAConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    num_tokens: int,
    sampling: SamplingParams,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Decode action tokens one by one with a key-value cache, restricted to the action bins.

    Args:
        language_model (`nn.Module`): A causal language model.
        config (`OpenVLAConfig`): Names the action tokens.
        inputs_embeds (`torch.Tensor`): The prompt, left-padded, (B, T, H).
        attention_mask (`torch.Tensor`): (B, T), zero at the padding.
        num_tokens (`int`): Tokens to decode.
        sampling (`SamplingParams`): Greedy or sampled.

    Returns:
        `tuple`: Token ids (B, num_tokens), and the logits of the action tokens they were chosen from, in the order of
        the ids, (B, num_tokens, n_action_bins).

    Raises:
        FloatingPointError: If logits are not finite.
    """
    decoder = TokenDecoder(language_model, config, inputs_embeds, attention_mask)
    token_ids, logits = [], []
    for step in range(num_tokens):
        if step:
            decoder.append(token_ids[-1])
        logits.append(decoder.next_logits())  # (B, n_action_bins)
        token_ids.append(sampling.select(logits[-1]) + config.action_token_begin)  # (B,)
    logits = torch.stack(logits, dim=1)
    check_finite(logits)
    return torch.stack(token_ids, dim=1), logits


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
    decoder = TokenDecoder(language_model, config, inputs_embeds, attention_mask)
    token_ids, logits = [], [decoder.next_logits()]
    costs, next_states = (torch.from_numpy(table).to(logits[0].device) for table in grammar)  # (S, V)
    missing = torch.full((len(inputs_embeds),), num_symbols, device=logits[0].device)  # (B,)
    states = torch.zeros_like(missing)
    while True:
        check_finite(logits[-1])
        # A character that is begun needs one symbol more.
        fits = costs[states] + (next_states[states] > 0) <= missing[:, None]  # (B, V)
        has_ended = missing == 0
        tokens = sampling.select(logits[-1].flip(-1), fits | has_ended[:, None])  # (B,), 0 has the last id
        token_ids.append((config.action_token_end - 1 - tokens).where(~has_ended, config.stop_token_id))
        missing = missing - costs[states, tokens].where(~has_ended, 0)
        states = next_states[states, tokens].where(~has_ended, 0)
        if not missing.any():
            return torch.stack(token_ids, dim=1), torch.stack(logits, dim=1)
        decoder.append(token_ids[-1])
        logits.append(decoder.next_logits())


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
    See what each position sees: one batch in which the last token is changed, and the padding in front.

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
    mask[:, 0] = 0
    hidden = decode(rows, mask)[:, 1:].float()  # (4, T - 1, H)
    change = (hidden[1:] - hidden[0]).abs().amax(dim=-1)  # (3, T - 1)
    # The same row twice: what differs there is rounding.
    changed = (change[1:] > 10 * change[0].max()).tolist()
    expected = [attention_mode == "bidirectional"] * (len(row) - 2) + [True]
    if changed != [expected, [False] * (len(row) - 1)]:
        raise RuntimeError(
            f"The language model's attention is not {attention_mode}, as the configuration says. Positions that "
            f"changed with the last token: {changed[0]}; with the padding: {changed[1]}. The attention implementation "
            "does not follow the mask; set another one, such as `attn_implementation='sdpa'`."
        )
