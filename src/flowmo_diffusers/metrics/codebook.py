"""Whether a discrete tokenizer uses the bits it stores."""

import math

import torch


def codebook_health(indices: torch.Tensor, group_size: int, levels: int = 2) -> dict[str, float]:
    """
    How evenly the codes of many images are spread over what could be stored.

    The entropy is that of the codes counted, the plug-in estimate: from N tokens it cannot exceed log2 N, nor can more
    than N codes be seen, whatever the codebook. `usable_codes` and `max_entropy_bits` are these bounds; a perfect
    codebook stays below them too while tokens are few (as many tokens as codes show it 63 % of the codes). So compare
    these figures between equal numbers of tokens.

    Args:
        indices: (n, tokens, groups) int64, as [`FlowMoAutoencoder.encode`] gives them.
        group_size: Channels of a codebook group, the quantizer's `group_size`; for "lfq" these are its bits.
        levels: Values a channel can take, a power of two; 2 for "lfq". Each channel is log2(levels) bits.

    Returns:
        "bit_imbalance" and "worst_bit_imbalance": mean and greatest |2p - 1| over the bits of a token, p the share of
        tokens in which the bit is set; 0 is balanced, 1 is a bit that never changes.
        "dead_bits": how many bits of a token are the same in all tokens.
        "used_codes" of at most "usable_codes" = min(codebook, N): different codes of a group, mean over the groups.
        "entropy_bits" of at most "max_entropy_bits" = min(bits of a group, log2 N), mean over the groups.

    Raises:
        ValueError: If the shape does not fit, there is nothing to count, or an index is outside the codebook.
    """
    if indices.ndim != 3 or not indices.numel():
        raise ValueError(
            f"indices have shape {tuple(indices.shape)}; expected (images, tokens, groups), none of them 0"
        )
    codebook_size = levels**group_size
    if indices.min() < 0 or indices.max() >= codebook_size:
        raise ValueError(
            f"indices range from {indices.min()} to {indices.max()}; {group_size} channels of {levels} levels lie in "
            f"[0, {codebook_size})"
        )
    # The levels of a group are the digits of its index in a base that is a power of two: its bits are the index's.
    shifts = torch.arange(codebook_size.bit_length() - 1, device=indices.device)
    tokens = indices.flatten(0, 1)
    total = len(tokens)
    times_set, used, entropies = [], [], []
    for group in tokens.unbind(1):
        codes, counts = group.unique(return_counts=True)
        times_set.append((((codes[:, None] >> shifts) & 1) * counts[:, None]).sum(0))
        probabilities = counts.double() / total
        used.append(len(codes))
        entropies.append(-(probabilities * probabilities.log2()).sum().item())
    # Of all bits of a token: how often it is set less how often it is not.
    surplus = (2 * torch.cat(times_set) - total).abs()
    return {
        "bit_imbalance": surplus.double().mean().item() / total,
        "worst_bit_imbalance": surplus.max().item() / total,
        "dead_bits": float((surplus == total).sum().item()),
        "used_codes": sum(used) / len(used),
        "usable_codes": float(min(codebook_size, total)),
        "entropy_bits": sum(entropies) / len(entropies),
        "max_entropy_bits": float(min(len(shifts), math.log2(total))),
    }
