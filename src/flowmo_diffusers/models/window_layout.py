"""How many windows there are and where they lie: whole numbers only, for token files are read without PyTorch."""


def default_overlap(size: int) -> int:
    """A quarter of a window's side: `docs/any-size.md` has what more and less of it cost and bring."""
    return size // 4


def count_along(length: int, size: int, overlap: int) -> int:
    """The fewest windows of `size` pixels, neighbours sharing at least `overlap`, that cover `length` pixels."""
    return 1 - min(size - length, 0) // (size - overlap)


def count_windows(height: int, width: int, size: int, overlap: int) -> int:
    """Over an image, without laying them out."""
    return count_along(height, size, overlap) * count_along(width, size, overlap)


def starts_along(length: int, size: int, overlap: int) -> list[int]:
    """
    Where they begin, in pixels: evenly spread from 0 to `length` - `size`, each at the nearest whole pixel, of two
    that are as near at the even one.
    """
    gaps = count_along(length, size, overlap) - 1
    return [round(i * (length - size) / gaps) for i in range(gaps + 1)] if gaps else [0]
