"""How one token is drawn from logits: the only place that does it.

A token is drawn by inverting the cumulative distribution at one uniform number per row. The numbers are drawn up
front, one for each token that each answer may have, so an answer depends neither on the rows beside it nor on the order
in which answers are worked on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from threefold.config.recipe import SamplingSection

NUCLEUS_TOKENS = 512
"""Where top-p looks first: the tokens of which it is made are rarely more."""


def draw_uniforms(num_answers: int, max_new_tokens: int, generator: torch.Generator) -> Tensor:
    """The randomness of every answer: [num_answers, max_new_tokens] in [0, 1), on the generator's device.

    float64, because float32's steps of 2^-24 are as large as the probabilities of unlikely tokens, which would then
    come up a whole number of steps too often or never. (Apple's GPUs have no float64; there they are float32.)
    """
    dtype = torch.float32 if generator.device.type == "mps" else torch.float64
    return torch.rand(num_answers, max_new_tokens, generator=generator, device=generator.device, dtype=dtype)


def restrict_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf all logits outside the k likeliest tokens, then outside the smallest set that reaches probability p.

    The likeliest token always stays. Ties at the k-th place are kept, all of them; top-p is applied to what top-k left,
    renormalised (the order that transformers uses).

    Args:
        logits: [B, V] float32, already divided by the temperature.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return logits if top_p == 1.0 else _nucleus(logits, top_p)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens down to the one at which their probabilities reach top_p; the rest becomes -inf.

    On the CPU a full sort of the vocabulary costs more than a decode step, and the nucleus is mostly small, so it is
    first looked for among the likeliest.
    """
    vocab_size = logits.shape[1]
    few = min(NUCLEUS_TOKENS, vocab_size) if logits.device.type == "cpu" else vocab_size
    total = logits.logsumexp(dim=-1, keepdim=True)
    for count in (few, vocab_size):
        ordered, order = logits.topk(count) if count < vocab_size else logits.sort(descending=True)
        probabilities = (ordered - total).exp()
        dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
        if count == vocab_size or bool(dropped[:, -1].all()):
            break
    dropped[:, 0] = False
    return torch.full_like(logits, -torch.inf).scatter(1, order, ordered.masked_fill(dropped, -torch.inf))


def _draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token at which the cumulative probability exceeds the number's share of the total.

    The sum is float64: over 200,000 tokens a float32 sum loses more than an unlikely token has. Added up one after the
    other, as a CPU does, it never grows at an impossible token, and its end is above every share below 1, so none is
    ever met. A GPU adds in parallel, where a sum may be a last digit above the next one; there that is made sure of.

    Args:
        probabilities: [B, V] float32.
        uniforms: [B] in [0, 1).

    Returns:
        [B, 1] int64; of no meaning, but within the vocabulary, where probabilities are not numbers.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=uniforms.dtype)
    shares = uniforms.clamp_max(1 - torch.finfo(uniforms.dtype).eps).unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, shares, right=True).clamp_max_(probabilities.shape[1] - 1)
    if probabilities.device.type != "cpu":
        possible = probabilities.gather(1, tokens) > 0
        tokens = torch.where(possible, tokens, probabilities.argmax(dim=-1, keepdim=True))
    return tokens


def draw_tokens(
    logits: Tensor, sampling: SamplingSection, uniforms: Tensor, stop_ids: Tensor, stop_banned: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row.

    A token of probability 0 is never drawn. A row with a logit of NaN or +inf, or with nothing left to draw, gives
    log-probabilities that are not finite, by which the caller knows: every probability of the row depends on every
    logit of it through the softmax's denominator.

    Args:
        logits: [B, V] float32, as the model gave them.
        sampling: temperature 0 takes the likeliest token.
        uniforms: [B], one number in [0, 1) per row, from `draw_uniforms`.
        stop_ids: int64, any number of them.
        stop_banned: [B] bool, the rows that may not stop yet (fewer tokens than min_new_tokens); None: no row.

    Returns:
        tokens [B] int64; their log-probability under softmax(logits / temperature); the same under the distribution
        that was really drawn from (the very same tensor where nothing restricts it). With temperature 0 the first is
        at temperature 1 and the second is 0.
    """
    scaled = logits if sampling.temperature in (0, 1) else logits / sampling.temperature
    allowed = scaled
    if stop_banned is not None and len(stop_ids):
        banned = torch.zeros_like(scaled, dtype=torch.bool)
        banned[:, stop_ids] = stop_banned.unsqueeze(1)
        allowed = scaled.masked_fill(banned, -torch.inf)
    if sampling.temperature == 0:
        tokens = allowed.argmax(dim=-1, keepdim=True)
        logprobs = scaled.log_softmax(dim=-1).gather(1, tokens).squeeze(1)
        return tokens.squeeze(1), logprobs, torch.where(logprobs.isfinite(), 0.0, logprobs)
    allowed = restrict_logits(allowed, sampling.top_k, sampling.top_p)
    probabilities = allowed.softmax(dim=-1)
    tokens = _draw(probabilities, uniforms)
    if allowed is scaled:
        logprobs = probabilities.gather(1, tokens).log_().squeeze(1)
        return tokens.squeeze(1), logprobs, logprobs
    # not log(softmax): a token that is likely among the allowed may have probability 0 in float32 among all
    logprobs, sampled = (x.log_softmax(dim=-1).gather(1, tokens).squeeze(1) for x in (scaled, allowed))
    return tokens.squeeze(1), logprobs, sampled
