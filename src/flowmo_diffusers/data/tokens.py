"""Images stored as tokens: a Hugging Face dataset of packed codes, and the tokenizer that they are of."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flowmo_diffusers.data.loading import Shuffled
from flowmo_diffusers.data.sources import Labels, Numbered, spread
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.digests import config_entries, differences, json_digest, module_digest
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.models.quantizers import build_quantizer


# What tokens depend on beside the encoder's weights. `sample_size` is not among them: any size can be encoded.
_ENCODER_FIELDS = (
    *("in_channels", "patch_size", "num_latent_tokens", "latent_channels", "codebook_bits", "quantizer"),
    *("encoder_num_layers", "encoder_hidden_size", "num_attention_heads", "mlp_ratio", "rope_axes", "rope_theta"),
)

_ROWS_AT_ONCE = 10_000
_FILE_BYTES = 1 << 28


def tokenizer_identity(autoencoder: FlowMoAutoencoder) -> dict[str, Any]:
    """
    What tells tokens of this tokenizer from those of others, as plain JSON values: the form of the tokens, and a
    digest of the encoder. The decoder has no part in it, so tokens stay valid when it alone is trained on (stage 1B).

    Args:
        autoencoder: In float32, as it is stored.

    Raises:
        ValueError: If its codes are not discrete, or it is of another dtype.
    """
    config = config_entries(autoencoder)
    if not autoencoder.quantize.is_discrete:
        raise ValueError(f"quantizer={config['quantizer']!r} has no discrete codes: nothing can be stored as tokens")
    if dtypes := {str(parameter.dtype) for parameter in autoencoder.encoder.parameters()} - {"torch.float32"}:
        raise ValueError(f"the tokenizer is of {sorted(dtypes)}: its identity is that of its float32 weights")
    quantizer = {
        "name": config["quantizer"],
        "channels": config["latent_channels"],
        "codebook_bits": config["codebook_bits"],
        "fsq_levels": config["fsq_levels"] if config["quantizer"] == "fsq" else None,
    }
    settings = {name: config[name] for name in _ENCODER_FIELDS}
    return {
        "digest": json_digest([settings, quantizer, module_digest(autoencoder.encoder)]),
        "num_tokens": config["num_latent_tokens"],
        "token_groups": autoencoder.quantize.groups,
        "group_bits": config["codebook_bits"],
        "quantizer": quantizer,
    }


def check_tokenizer(identity_there: Mapping[str, Any], identity_here: Mapping[str, Any]) -> None:
    """Raises `ValueError` that says how they differ, if tokens of one tokenizer meet those of another."""
    if found := differences(identity_there, identity_here):
        raise ValueError(f"tokens of another tokenizer: {'; '.join(found)}")


def description_file(folder: str | Path, split: str) -> Path:
    """Beside the data of a split; it is written last, so a split that has one is whole."""
    return Path(folder) / f"tokens-{split}.json"


def read_descriptions(folder: str | Path) -> dict[str, dict[str, Any]]:
    """
    What is written of each finished split of a folder.

    Raises:
        OSError: If it is damaged.
    """
    found = {}
    for file in sorted(Path(folder).glob("tokens-*.json")):
        try:
            found[file.stem.removeprefix("tokens-")] = json.loads(file.read_text())
        except ValueError as error:
            raise OSError(f"{file} is damaged: {error}") from error
    return found


def check_folder(folder: str | Path, split: str, wanted: Mapping[str, Any]) -> bool:
    """
    Whether a split is finished already.

    Args:
        wanted: What is going to be written: "tokenizer", "class_names" and "settings".

    Raises:
        ValueError: If it was written by other settings, or the folder's other splits do not go with it; names the
            difference.
        OSError: If a description is damaged.
    """
    found = read_descriptions(folder)
    for name, there in found.items():
        try:
            check_tokenizer(there["tokenizer"], wanted["tokenizer"])
        except ValueError as error:
            raise ValueError(f"{folder} holds, as split {name!r}, {error}") from None
        if there["class_names"] != wanted["class_names"]:
            raise ValueError(f"{folder} holds split {name!r} with other classes: use another --output_dir")
    if split in found and (changed := differences(found[split]["settings"], wanted["settings"])):
        raise ValueError(f"{folder} holds split {split!r} by other settings: {'; '.join(changed)}")
    return split in found


def write_tokens(
    folder: str | Path,
    split: str,
    chunks: Chunks,
    labels: Labels | None,
    variants: int,
    description: Mapping[str, Any],
) -> None:
    """
    Writes a split: `data/{split}-....parquet`, which `datasets.load_dataset(folder)` reads, and its description.

    Args:
        chunks: Finished ones with columns "packed" (n, bytes) uint8 and "number" (n,) int64, which is
            `image * variants + variant`.
        labels: Of the images, by their number.
        description: Plain JSON values, "tokenizer" among them.
    """
    classes = datasets.ClassLabel(names=labels.names) if labels and labels.names else datasets.Value("int64")
    whole = datasets.Value("int64")
    features = datasets.Features(
        {"codes": datasets.Value("binary"), "label": classes, "image": whole, "variant": whole}
    )
    ids = labels.ids if labels else None
    size = packed_bytes(description["tokenizer"])
    rows, per_file = chunks.stream("packed", "number"), max(_FILE_BYTES // (chunks.size * size), 1)
    num_files = -(-len(chunks) // per_file)
    files, count = {}, 0
    for number in range(num_files):
        path = Path(folder) / "data" / f"{split}-{number:05}-of-{num_files:05}.parquet"
        tables = [_table(piece, size, ids, variants) for piece in islice(rows, per_file) if piece]
        table = pa.concat_tables(tables) if tables else features.arrow_schema.empty_table()
        dataset = datasets.Dataset(table.cast(features.arrow_schema), datasets.DatasetInfo(features=features))
        with atomic_file(path) as temporary:
            dataset.to_parquet(temporary)
        files[path.name] = _checksum(path, size)
        count += len(dataset)
    values = {
        **description,
        "count": count,
        "bytes_per_image": size,
        "variants": variants,
        "class_names": labels.names if labels else None,
        "num_classes": _num_classes(labels),
        "files": files,
    }
    with atomic_file(description_file(folder, split)) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def packed_bytes(identity: Mapping[str, Any]) -> int:
    """Bytes of an image's tokens."""
    return build_quantizer(**identity["quantizer"]).packed_bytes(identity["num_tokens"])


def _num_classes(labels: Labels | None) -> int:
    if labels is None:
        return 0
    return len(labels.names) if labels.names else int(labels.ids.max(initial=-1)) + 1


def _table(piece: Mapping[str, torch.Tensor], size: int, ids: np.ndarray | None, variants: int) -> pa.Table:
    image, variant = np.divmod(piece["number"].numpy(), variants)
    codes = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), len(image), [None, pa.py_buffer(piece["packed"].contiguous().numpy())]
    )
    label = np.full(len(image), -1) if ids is None else ids[image]
    return pa.table({"codes": codes.cast(pa.binary()), "label": label, "image": image, "variant": variant})


def _checksum(path: Path, size: int) -> str:
    """
    Hex digest of codes and labels in order.

    Raises:
        OSError: If the file is missing or damaged, or codes are not of this length.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["codes", "label"]):
                # The cast fails where a length is another.
                codes = batch["codes"].cast(pa.binary(size))
                for code_bytes, label in zip(codes.to_pylist(), batch["label"].to_pylist(), strict=True):
                    digest.update(code_bytes + label.to_bytes(8, "little", signed=True))
    except (pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise OSError(f"{path} is damaged, or holds no codes of {size} bytes: {error}") from error
    return digest.hexdigest()


class TokenSet(Numbered):
    """
    Stored tokens by number, from 0 to len - 1, read from disk as they are asked for; see [`load_tokens`].

    Attributes:
        description: Of the split, as it is written beside it.
        images: (n,) int64, number of the image of each row in its source.
        labels: (n,) int64, its class; -1 where it has none.
    """

    def __init__(self, dataset: datasets.Dataset, description: dict[str, Any]):
        super().__init__(len(dataset))
        self.description = description
        self._dataset = dataset
        self._quantizer = build_quantizer(**description["tokenizer"]["quantizer"])
        self._images = dataset.data.column("image").to_numpy()
        self._labels = dataset.data.column("label").to_numpy()

    @property
    def identity(self) -> dict[str, Any]:
        """Of the tokenizer; see [`tokenizer_identity`]."""
        return self.description["tokenizer"]

    @property
    def checksum(self) -> str:
        """Of all codes and labels of the split."""
        return json_digest(self.description["files"])

    @property
    def class_names(self) -> list[str] | None:
        """By class id, where they are known."""
        return self.description["class_names"]

    @property
    def num_classes(self) -> int:
        """0 where images have no classes."""
        return self.description["num_classes"]

    @property
    def images(self) -> torch.Tensor:
        return torch.from_numpy(self._images[self._rows])

    @property
    def labels(self) -> torch.Tensor:
        return torch.from_numpy(self._labels[self._rows])

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        """Packed codes (bytes,) uint8 and class."""
        row = int(self._rows[number])
        codes = self._dataset.data.column("codes")[row].as_buffer()
        return torch.frombuffer(bytearray(codes), dtype=torch.uint8), int(self._labels[row])

    def packed(self, numbers: Sequence[int]) -> torch.Tensor:
        """Packed codes of these numbers: (n, bytes) uint8."""
        size = self.description["bytes_per_image"]
        rows = [self[number][0] for number in numbers]
        return torch.stack(rows) if rows else torch.empty(0, size, dtype=torch.uint8)

    def indices(self, numbers: Sequence[int]) -> torch.Tensor:
        """Indices of these numbers, as [`FlowMoAutoencoder.encode`] gives them: (n, tokens, groups) int64."""
        return self.to_indices(self.packed(numbers))

    def to_indices(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed codes (n, bytes) uint8 to (n, tokens, groups) int64, on any device."""
        return self._quantizer.packed_to_indices(packed, self.identity["num_tokens"])

    def set_aside(self, count: int) -> tuple["TokenSet", "TokenSet"]:
        """
        All but `count` images, and these, spread evenly, each with all its variants.

        Raises:
            ValueError: If none would be left.
        """
        images = self._images[self._rows]
        known = np.unique(images)
        if len(known) <= count:
            raise ValueError(f"{count} images cannot be held out of {len(known)}: lower --num_validation_images")
        held = np.isin(images, known[spread(count, len(known))])
        return self.select(np.flatnonzero(~held)), self.select(np.flatnonzero(held))


class ShuffledTokens(Shuffled):
    """
    Endless training order over a [`TokenSet`], see [`Shuffled`]. An item is {"packed": (bytes,) uint8, "labels": its
    class, "visits": v, "bad": []}; batches are [`image_batches`].
    """

    def __getitem__(self, visit: int) -> dict:
        packed, label = self.source[self.number(visit)]
        return {"packed": packed, "labels": label, "visits": visit, "bad": []}


def load_tokens(folder: str | Path, split: str = "train", cache_dir: str | Path | None = None) -> TokenSet:
    """
    A split of a folder that `training/tokenize_images.py` has written.

    Args:
        cache_dir: Cache of `datasets`, in which the rows are mapped into memory.

    Raises:
        ValueError: If there is no such split.
        OSError: If there are no tokens, or a file is missing or damaged.
    """
    found = read_descriptions(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no finished tokens: training/tokenize_images.py writes them")
    if split not in found:
        raise ValueError(f"split={split!r} does not exist: {folder} has tokens of {sorted(found)}")
    description = found[split]
    paths = [Path(folder) / "data" / name for name in description["files"]]
    for path in paths:
        if _checksum(path, description["bytes_per_image"]) != description["files"][path.name]:
            raise OSError(f"{path} is damaged: it does not hold the codes and labels that were written")
    files = {split: [str(path) for path in paths]}
    dataset = datasets.load_dataset("parquet", data_files=files, split=split, cache_dir=cache_dir)
    return TokenSet(dataset, description)
