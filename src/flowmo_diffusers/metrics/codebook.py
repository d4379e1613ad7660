"""Whether a discrete tokenizer uses the bits it stores."""

import math

import torch


def codebook_health(indices: torch.Tensor, group_size: int, levels: int = 2) -> dict[str, float]:
    """
    How evenly the codes of many images are spread over what could be stored.

    Args:
        indices: (n, tokens, groups) int64, as [`FlowMoAutoencoder.encode`] gives them.
        group_size: Channels of a codebook group, the quantizer's `group_size`; for "lfq" these are its bits.
        levels: Values a channel can take, a power of two; 2 for "lfq". Each channel is log2(levels) bits.

    Returns:
        "bit_imbalance" and "worst_bit_imbalance": mean and greatest |2p - 1| over the bits of a token, p the share of
        tokens in which the bit is set; 0 is balanced, 1 is a bit that never changes.
        "dead_bits": how many bits of a token are the same in all tokens.
        And what [`codebook_use`] gives.

    Raises:
        ValueError: If the shape does not fit, there is nothing to count, or an index is outside the codebook.
    """
    counted = _count(indices, levels**group_size, f"{group_size} channels of {levels} levels")
    total = indices.shape[0] * indices.shape[1]
    # The levels of a group are the digits of its index in a base that is a power of two: its bits are the index's.
    shifts = torch.arange((levels**group_size).bit_length() - 1, device=indices.device)
    times_set = torch.cat([(((codes[:, None] >> shifts) & 1) * counts[:, None]).sum(0) for codes, counts in counted])
    # Of all bits of a token: how often it is set less how often it is not.
    surplus = (2 * times_set - total).abs()
    return {
        "bit_imbalance": surplus.double().mean().item() / total,
        "worst_bit_imbalance": surplus.max().item() / total,
        "dead_bits": float((surplus == total).sum().item()),
        **_use(counted, levels**group_size, total),
    }


def codebook_use(indices: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """
    How many codes of a codebook are used, and how evenly: of any codebook, also one whose numbering means nothing.

    The entropy is that of the codes counted, the plug-in estimate: from N tokens it cannot exceed log2 N, nor can more
    than N codes be seen, whatever the codebook. `usable_codes` and `max_entropy_bits` are these bounds; a perfect
    codebook stays below them too while tokens are few (as many tokens as codes show it 63 % of the codes). So compare
    these figures between equal numbers of tokens.

    Args:
        indices: (n, tokens, groups) int64.
        codebook_size: Codes that an index can name.

    Returns:
        "used_codes" of at most "usable_codes" = min(codebook, N): different codes of a group, mean over the groups.
        "entropy_bits" of at most "max_entropy_bits" = min(log2 codebook, log2 N), mean over the groups.

    Raises:
        ValueError: As [`codebook_health`].
    """
    counted = _count(indices, codebook_size, f"{codebook_size} codes")
    return _use(counted, codebook_size, indices.shape[0] * indices.shape[1])


def _count(indices: torch.Tensor, codebook_size: int, meaning: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The codes of each group that occur, and how often."""
    if indices.ndim != 3 or not indices.numel():
        raise ValueError(
            f"indices have shape {tuple(indices.shape)}; expected (images, tokens, groups), none of them 0"
        )
    if indices.min() < 0 or indices.max() >= codebook_size:
        raise ValueError(
            f"indices range from {indices.min()} to {indices.max()}; {meaning} lie in [0, {codebook_size})"
        )
    return [group.unique(return_counts=True) for group in indices.flatten(0, 1).unbind(1)]


def _use(counted: list[tuple[torch.Tensor, torch.Tensor]], codebook_size: int, total: int) -> dict[str, float]:
    shares = [counts.double() / total for _, counts in counted]
    entropies = [-(share * share.log2()).sum().item() for share in shares]
    return {
        "used_codes": sum(len(codes) for codes, _ in counted) / len(counted),
        "usable_codes": float(min(codebook_size, total)),
        "entropy_bits": sum(entropies) / len(entropies),
        "max_entropy_bits": math.log2(min(codebook_size, total)),
    }
