"""FlowMoTokenGenerator: what a prediction may depend on, its cache, and every mode a user may put it in."""

import copy
import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from token_models import TINY, build_generator, random_indices

from flowmo_diffusers import FlowMoAutoencoder, FlowMoTokenGenerator
from flowmo_diffusers.models.mmdit import HeadNorm
from flowmo_diffusers.models.token_generator import (
    FlowMoTokenAttnProcessor,
    FlowMoTokenBlock,
    FlowMoTokenCache,
    indices_to_bits,
)
from flowmo_diffusers.objectives.tokens import TokenDraws, token_loss


LABELS = torch.tensor([0, 2])
ORDERS = ("masked", "autoregressive")
both_orders = pytest.mark.parametrize("order", ORDERS)


def on_meta(**config) -> FlowMoTokenGenerator:
    with torch.device("meta"):
        return FlowMoTokenGenerator(**config)


def half_masked(indices: torch.Tensor) -> torch.Tensor:
    where = torch.rand(indices.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    return indices.masked_fill(where, -1)


def changed(model: FlowMoTokenGenerator, indices: torch.Tensor, token: int, group: int) -> torch.Tensor:
    """Where the logits (b, tokens, groups) differ once one group is another in every image."""
    other = indices.clone()
    other[:, token, group] ^= 2**model.config.group_bits - 1
    before, after = (model(tokens, LABELS).logits for tokens in (indices, other))
    return (before - after).abs().amax(-1) > 1e-5


def training_step(model: FlowMoTokenGenerator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch with images of every class and of none."""
    indices = random_indices(model, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    draws = TokenDraws.sample(indices, torch.tensor([0, 1, 2, 3]), 3, generators, class_dropout=0.0)
    model.zero_grad()
    loss = token_loss(model.train(), indices, draws, model.config.order)["loss"]
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


# Configuration


def test_defaults_are_maskbits_size():
    """Catches another width, depth or head: MaskBit's 305 M of parameters, and what the adaptive norms add."""
    model = on_meta()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == 313.1
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert blocks / 24 == 12 * 1024**2 + 13 * 1024 + 6 * 1024 - 4 * 1024 + 2 * 64
    assert model.head.linear.out_features == 2 * 512 and model.null_class == 1000


def test_four_groups_of_14_bits():
    """Catches heads that are built for FlowMo-Lo's groups alone."""
    model = on_meta(token_groups=4, group_bits=14)
    assert model.token_in.in_features == 56 and model.head.linear.out_features == 4 * 2**14
    tiny = build_generator(token_groups=4, group_bits=14)
    assert tiny(random_indices(tiny), LABELS).logits.shape == (2, 8, 4, 2**14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0 must be a whole number of at least 1"),
        ({"token_groups": 0}, "token_groups=0 must be a whole number of at least 1"),
        ({"num_tokens": 8.0}, "num_tokens=8.0 must be a whole number"),
        ({"hidden_size": None}, "hidden_size=None must be a whole number"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 must be a positive number"),
        ({"num_layers": -1}, "num_layers=-1 must be a whole number of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number of at least 1"),
        ({"group_bits": 0}, "group_bits=0 must be from 1 to 16"),
        ({"group_bits": 18}, "group_bits=18 must be from 1 to 16.*codebook_bits"),
        ({"num_classes": -1}, "num_classes=-1 must be a whole number of at least 0"),
        ({"hidden_size": 33}, "hidden_size=33 must be a multiple of num_attention_heads=2"),
        ({"order": "random"}, "order='random' is unknown.*'masked' or 'autoregressive'"),
        ({"id2label": {0: "cat", 1: "dog"}}, "id2label has 2 names"),
        ({"id2label": {0: "cat", 1: "dog", 3: "owl"}}, "id2label.*from 0 to num_classes - 1"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    """Catches fields that do not fit each other, which fail later or train a model that is of no use."""
    with pytest.raises(ValueError, match=message):
        FlowMoTokenGenerator(**{**TINY, **changes})


def test_names_that_diffusers_looks_up_exist():
    """Catches a renamed class: sharding, offloading and compilation would pass over the blocks without a word."""
    model = build_generator()
    names = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules == model._repeated_blocks == ["FlowMoTokenBlock"]
    assert set(model._no_split_modules) <= names
    paths = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    assert all(any(pattern in path for path in paths) for pattern in model._skip_layerwise_casting_patterns)
    assert FlowMoTokenGenerator._supports_gradient_checkpointing


# What a prediction depends on


def test_bits_are_the_codes(tiny_autoencoder: FlowMoAutoencoder):
    """Catches bits read from the other end, or a group whose bits are not the channels it was made of."""
    assert indices_to_bits(torch.tensor([6, -1]), 3).tolist() == [[-1, 1, 1], [0, 0, 0]]
    indices = random_indices(build_generator())
    codes = tiny_autoencoder.indices_to_codes(indices)
    bits = indices_to_bits(indices, 3)  # channel d * groups + g is bit d of group g
    assert torch.equal(bits.transpose(-1, -2).flatten(-2).float(), codes)


def test_masked_predictions_see_all_that_is_known():
    """Catches attention that is causal, or a group that the others of its token or of other tokens do not see."""
    model = build_generator()
    indices = random_indices(model)
    for token, group in ((0, 0), (0, 1), (4, 1), (7, 0), (7, 1)):
        assert changed(model, indices, token, group).all()


def test_tokens_are_told_apart_by_their_positions():
    """Catches positions that are left out: fully masked tokens would all have one prediction."""
    for order in ORDERS:
        model = build_generator(order=order)
        logits = model(torch.full((1, 8, 2), -1), LABELS[:1]).logits.flatten(1, 2)
        assert (torch.pdist(logits[0]) > 1e-2).all()


def test_autoregressive_predictions_see_what_is_before_them():
    """Catches a group that sees itself or a later one, or misses an earlier one, in its own token above all."""
    model = build_generator(order="autoregressive", token_groups=3)
    indices = random_indices(model)
    place = torch.arange(8 * 3).reshape(8, 3)
    for token, group in ((0, 0), (0, 1), (0, 2), (3, 0), (3, 1), (3, 2), (7, 0), (7, 1), (7, 2)):
        after = place > place[token, group]
        assert torch.equal(changed(model, indices, token, group), after.expand(2, -1, -1))


def test_later_tokens_may_be_left_out_or_masked():
    """Catches a sampler's prefix that is not predicted as the same tokens are in training."""
    model = build_generator(order="autoregressive")
    indices = random_indices(model)
    expected = model(indices, LABELS).logits
    for length in (1, 2, 7, 8):
        for group in (0, 1):
            past = indices[:, :length].clone()
            past[:, -1, group:] = -1
            logits = model(past, LABELS).logits
            assert logits.shape == (2, length, 2, 8)
            torch.testing.assert_close(logits[:, -1, group], expected[:, length - 1, group], rtol=0, atol=1e-5)


@both_orders
def test_every_class_counts(order):
    """Catches a condition that is not used, or a null class that is one of the others."""
    model = build_generator(order=order)
    indices = half_masked(random_indices(model, 1)).expand(4, -1, -1)
    logits = model(indices, torch.arange(4)).logits
    assert model.null_class == 3 and (torch.pdist(logits.flatten(1)) > 0.1).all()


@both_orders
def test_batch_equals_singles(order):
    """Catches an image that depends on its neighbours."""
    model = build_generator(order=order)
    indices = half_masked(random_indices(model))
    logits = model(indices, LABELS).logits
    assert logits.shape == (2, 8, 2, 8) and not torch.allclose(logits[0], logits[1], atol=1e-2)
    for i in range(2):
        torch.testing.assert_close(logits[i : i + 1], model(indices[i : i + 1], LABELS[i : i + 1]).logits)
    assert torch.equal(model(indices, LABELS, return_dict=False)[0], logits)


def test_models_without_labels():
    """Catches a model of no classes that has no null class either."""
    model = build_generator(num_classes=0)
    assert model.null_class == 0
    assert model(random_indices(model), torch.zeros(2, dtype=torch.long)).logits.shape == (2, 8, 2, 8)


@both_orders
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 3), (2, 9, 2), (2, 0, 2), (2, 8, 2, 1)])
def test_indices_that_do_not_fit_are_refused(order, shape):
    """Catches tokens of another tokenizer that broadcast, or fail deep inside."""
    with pytest.raises(ValueError, match=r"indices have shape.*expected \(batch, 8, 2\)"):
        build_generator(order=order)(torch.zeros(shape, dtype=torch.long), LABELS)


def test_labels_and_lengths_that_do_not_fit_are_refused():
    """Catches labels that broadcast over the batch, and a masked model that is given a prefix."""
    model = build_generator()
    for labels in (torch.tensor(0), LABELS[:1], LABELS[None]):
        with pytest.raises(ValueError, match=r"class_labels have shape.*expected \(2,\)"):
            model(random_indices(model), labels)
    with pytest.raises(ValueError, match=r"indices have shape \(2, 4, 2\)"):
        model(random_indices(model)[:, :4], LABELS)


# The cache


@pytest.mark.parametrize("start", [1, 5, 8])
@pytest.mark.parametrize("batch", [2, 4])
def test_cache_equals_the_full_pass(start, batch):
    """Catches a key at the wrong place, a token computed without its past, or a group that reads an old state."""
    model = build_generator(order="autoregressive")
    indices, labels = random_indices(model, 2).repeat(batch // 2, 1, 1), torch.arange(batch)
    expected = model(indices, labels).logits
    rows = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    cache = FlowMoTokenCache()
    for length in range(start, 9):
        for group in range(2):
            past = indices[:, :length].clone()
            past[:, -1, group:] = -1
            logits = model(past, labels, cache).logits
            assert logits.shape == (batch, 1, 2, 8)
            torch.testing.assert_close(logits[:, 0, group], expected[:, length - 1, group], rtol=0, atol=1e-5)
    assert rows == [start] + [1] * (8 - start)  # each token went through the blocks once
    assert cache.length == 8


def test_impossible_caches_are_refused():
    """Catches a cache that is of other tokens, whose predictions would be wrong without a word."""
    with pytest.raises(ValueError, match="cache.*masked generator has none"):
        build_generator()(torch.zeros(2, 8, 2, dtype=torch.long), LABELS, FlowMoTokenCache())
    model = build_generator(order="autoregressive")
    indices, cache = random_indices(model), FlowMoTokenCache()
    model(indices[:, :3], LABELS, cache)
    for length in (1, 2, 5, 8):
        with pytest.raises(ValueError, match=f"cache holds 3 tokens, indices have {length}"):
            model(indices[:, :length], LABELS, cache)
    assert cache.length == 3
    model(indices[:, :4], LABELS, cache)


# Training


@both_orders
def test_no_parameter_is_dead(order):
    """Catches weights that nothing depends on, and a class that is never trained."""
    loss, gradients = training_step(build_generator(order=order))
    assert torch.isfinite(loss)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    assert gradients["class_in.weight"].any(1).all() and gradients["positions"].any(1).all()
    assert all(gradient.any(0).all() for name, gradient in gradients.items() if name == "head.own_bits.weight")


@both_orders
def test_a_new_model_knows_nothing(order):
    """Catches a start that is far from even odds, as wide initial weights or a wrong scale in the head would be."""
    torch.manual_seed(0)
    model = FlowMoTokenGenerator(**{**TINY, "hidden_size": 256, "num_layers": 6, "order": order})
    loss = training_step(model)[0]
    assert loss.item() == pytest.approx(math.log(8), abs=0.3)


@both_orders
def test_gradient_checkpointing_changes_nothing(order):
    """Catches checkpointing that alters loss or gradients, or that is switched on without effect."""
    model, calls = build_generator(order=order), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = training_step(model)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    model.enable_gradient_checkpointing()
    checkpointed_loss, checkpointed = training_step(model)
    assert len(calls) == 2 + 4  # each block once more, in the backward pass
    assert torch.equal(checkpointed_loss, loss)
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in gradients.items())


@both_orders
def test_training_under_autocast(order):
    """Catches a product of two dtypes, or a loss that is taken in bfloat16."""
    model = build_generator(order=order)
    expected = training_step(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = training_step(model)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


# Dtypes, attention, graphs


@both_orders
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(order, dtype):
    """Catches an input or a table that stays in float32, in the forward pass and with a cache."""
    model = build_generator(order=order)
    indices = random_indices(model)
    expected = model(indices, LABELS).logits
    logits = model.to(dtype)(indices, LABELS).logits
    assert logits.dtype == dtype
    assert 0 < (logits.float() - expected).norm() < 0.05 * expected.norm()
    if order == "autoregressive":
        assert model(indices, LABELS, FlowMoTokenCache()).logits.dtype == dtype


@both_orders
def test_layerwise_casting(order):
    """Catches a projection that reads weights outside of its own forward, where they are still in storage dtype."""
    model = build_generator(order=order).to(torch.bfloat16)
    indices = random_indices(model)
    expected = model(indices, LABELS).logits.float()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert model.blocks[0].attn.to_qkv.weight.dtype == torch.float8_e4m3fn
    logits = model(indices, LABELS).logits
    assert logits.dtype == torch.bfloat16
    assert 0 < (logits.float() - expected).norm() < 0.5 * expected.norm()


class CountingProcessor(FlowMoTokenAttnProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


def test_processors_are_listed_and_replaced():
    """Catches attention that diffusers does not find, or that does not go through its processor."""
    model = build_generator()
    indices = random_indices(model)
    expected = model(indices, LABELS).logits
    assert list(model.attn_processors) == [f"blocks.{i}.attn.processor" for i in range(2)]
    own = CountingProcessor()
    model.set_attn_processor(own)
    assert torch.equal(model(indices, LABELS).logits, expected) and own.calls == 2
    model.fuse_qkv_projections()  # the projections are one matrix already: nothing to do, and no error
    assert torch.equal(model(indices, LABELS).logits, expected)


@both_orders
def test_attention_backend(order):
    """Catches a backend that is not handed on, or that takes the causal order another way."""
    model = build_generator(order=order)
    indices = random_indices(model)
    expected = model(indices, LABELS).logits
    for backend in ("_native_math", "native"):
        with torch.no_grad():
            model.set_attention_backend(backend)
            assert {p._attention_backend.value for p in model.attn_processors.values()} == {backend}
            torch.testing.assert_close(model(indices, LABELS).logits, expected, rtol=0, atol=1e-4)
    model.reset_attention_backend()


def test_attention_is_softmax_of_normed_heads():
    """Catches heads that are mixed up or a wrong scale, against the formula written out."""
    model = build_generator(order="autoregressive")
    attn, x = model.blocks[0].attn, torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    assert isinstance(attn.norm_q, HeadNorm) and isinstance(model.blocks[0], FlowMoTokenBlock)
    query, key, value = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in attn.to_qkv(x).chunk(3, dim=-1))
    scores = attn.norm_q(query) @ attn.norm_k(key).transpose(-1, -2) / 4
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = attn.to_out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), expected, rtol=0, atol=1e-5)


@both_orders
def test_blocks_compile_in_one_graph(order):
    """Catches a graph break in a block, the part that training compiles; the backend is eager: nothing is built."""
    model = build_generator(order=order, num_layers=1)
    indices = random_indices(model)
    expected = model(indices, LABELS).logits
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(indices, LABELS).logits, expected)
    torch._dynamo.reset()


def test_blocks_compile_once_for_all_with_a_cache():
    """Catches a cache that compiles each block anew, which beyond eight blocks fails."""
    model = build_generator(order="autoregressive", num_layers=10)
    indices = random_indices(model)
    expected = model(indices, LABELS).logits
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    cache = FlowMoTokenCache()
    for length in range(1, 4):
        logits = model(indices[:, :length], LABELS, cache).logits
        torch.testing.assert_close(logits[:, -1], expected[:, length - 1], atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_a_single_group_has_no_order():
    """Catches weights for groups before the only one, which would never be trained."""
    with_groups = {name for name, _ in build_generator(order="autoregressive").named_parameters()}
    single = build_generator(order="autoregressive", token_groups=1)
    assert {name.split(".")[1] for name in with_groups - {name for name, _ in single.named_parameters()}} == {
        "own_bits",
        "mlp",
    }


# Copies and files


def test_copies_are_equal_and_independent():
    """Catches a model that cannot be pickled or copied for an EMA or a worker, or whose copy shares its weights."""
    model = build_generator()
    indices = random_indices(model)
    expected = model(indices, LABELS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dict(twin.config) == dict(model.config)
        assert torch.equal(twin(indices, LABELS).logits, expected)
        torch.nn.init.zeros_(twin.head.linear.weight)
        assert torch.equal(model(indices, LABELS).logits, expected)


@both_orders
def test_saved_model_is_bit_exact(order, tmp_path):
    """Catches a configuration that JSON changes (names whose ids become strings), or a weight that is not saved."""
    names = {0: "cat", 1: "dog, hound", 2: "owl"}
    model = build_generator(order=order, id2label=names, tokenizer="abc", mlp_ratio=2.5)
    assert model.config.id2label == names
    model.save_pretrained(tmp_path)
    loaded = FlowMoTokenGenerator.from_pretrained(tmp_path)
    assert loaded.config.id2label == names and loaded.config.tokenizer == "abc" and loaded.config.order == order
    assert not loaded.training and loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    indices = half_masked(random_indices(model))
    assert torch.equal(copy.deepcopy(loaded)(indices, LABELS).logits, model(indices, LABELS).logits)
    again = FlowMoTokenGenerator.from_config(loaded.config)
    assert again.config.id2label == names
    assert FlowMoTokenGenerator.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_many_names_keep_their_ids(tmp_path):
    """Catches ids that are sorted as strings when they come back: 10 before 2."""
    names = {i: f"class {i}" for i in range(12)}
    build_generator(num_classes=12, id2label=names).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["10"] == "class 10"
    assert FlowMoTokenGenerator.from_pretrained(tmp_path).config.id2label == names


def test_other_and_damaged_checkpoints_are_refused(tiny_autoencoder: FlowMoAutoencoder, tmp_path):
    """Catches another model's checkpoint, or a damaged one, of which whatever has a known name is loaded."""
    tiny_autoencoder.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="checkpoint of a FlowMoAutoencoder, not of a FlowMoTokenGenerator"):
        FlowMoTokenGenerator.from_pretrained(tmp_path / "tokenizer")
    build_generator().save_pretrained(tmp_path / "generator")
    with pytest.raises(ValueError, match="checkpoint of a FlowMoTokenGenerator, not of a FlowMoAutoencoder"):
        FlowMoAutoencoder.from_pretrained(tmp_path / "generator")
    file = tmp_path / "generator" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["positions"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing.*positions"):
        FlowMoTokenGenerator.from_pretrained(tmp_path / "generator")
    with pytest.raises(ValueError, match="safetensors only"):
        FlowMoTokenGenerator.from_pretrained(tmp_path / "generator", use_safetensors=False)
