"""FlowMoGenerationPipeline: classes to tokens to images, given tokens, and what is said when a thing does not fit."""

import copy
import json

import numpy as np
import PIL.Image
import pytest
import torch
from token_models import build_generator, random_indices

from flowmo_diffusers import (
    FlowMoAutoencoder,
    FlowMoGenerationPipeline,
    FlowMoPipeline,
    FlowMoScheduler,
    FlowMoTokenGenerator,
    FlowMoTokenScheduler,
)
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.objectives.tokens import TokenDraws, token_loss


ORDERS = ("masked", "autoregressive")
both_orders = pytest.mark.parametrize("order", ORDERS)
NAMES = {0: "tabby, house cat", 1: "Dog", 2: "wild cat, tabby"}
FAST = {"decoder_num_inference_steps": 2, "output_type": "pt"}


def build_pipeline(
    autoencoder: FlowMoAutoencoder, order: str = "masked", schedule: dict | None = None, **changes
) -> FlowMoGenerationPipeline:
    model = build_generator(**{"order": order, "id2label": NAMES, **changes})
    pipe = FlowMoGenerationPipeline(model, FlowMoTokenScheduler(**(schedule or {})), autoencoder, FlowMoScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def steps_of(pipe: FlowMoGenerationPipeline) -> dict[str, int]:
    """A short run; an autoregressive generator has its own number of steps."""
    return {"num_inference_steps": 4} if pipe.generator.config.order == "masked" else {}


def generators(count: int = 3) -> list[torch.Generator]:
    return [keyed_generator(0, "image", number) for number in range(count)]


def one_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=ORDERS)
def pipe(request, tiny_autoencoder) -> FlowMoGenerationPipeline:
    return build_pipeline(tiny_autoencoder, request.param)


@pytest.fixture
def masked_pipe(tiny_autoencoder) -> FlowMoGenerationPipeline:
    return build_pipeline(tiny_autoencoder)


@pytest.fixture
def idle(pipe, monkeypatch) -> FlowMoGenerationPipeline:
    """A pipeline whose models must not be asked."""
    for model in (pipe.generator, pipe.autoencoder):
        monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("a model was asked"))
    return pipe


# Learning and sampling


@both_orders
def test_overfits_32_images_and_regenerates_them(tiny_autoencoder, order):
    """Catches training and sampling that do not fit each other: what is learned by heart must come out again."""
    changes = {"num_classes": 32, "id2label": None, "hidden_size": 64}
    pipe = build_pipeline(tiny_autoencoder, order, {"temperature": 0.0}, noise=0.05, **changes)
    model, labels, steps = pipe.generator.train(), torch.arange(32), 120
    indices = random_indices(model, 32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for step in range(steps):
        draws = [keyed_generator(0, "pretrain", 32 * step + number) for number in range(32)]
        draws = TokenDraws.sample(indices, labels, model.null_class, draws, class_dropout=0.0)
        terms = token_loss(model, indices, draws, order, label_smoothing=0.0)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        schedule.step()
    assert terms["token_loss"] < 0.02
    model.eval()
    assert torch.equal(pipe.generate_tokens(range(32), **steps_of(pipe), generator=one_generator()), indices)
    pipe.token_scheduler = FlowMoTokenScheduler(temperature=0.7)
    drawn = pipe.generate_tokens(list(range(32)), **steps_of(pipe), generator=one_generator())
    assert (drawn == indices).float().mean() > 0.99


def test_sampling_by_hand(masked_pipe):
    """Catches a wrong label, weight or order of the two halves, against the same steps written out."""
    pipe, scheduler = masked_pipe, FlowMoTokenScheduler()
    scheduler.set_timesteps(5)
    tokens, source = torch.full((2, 8, 2), -1), one_generator(3)
    for timestep, weight in zip(scheduler.timesteps, scheduler.guidance_weights(4.0), strict=True):
        with torch.no_grad():
            known, null = (pipe.generator(tokens, torch.tensor(ids)).logits for ids in ([1, 2], [3, 3]))
        tokens = scheduler.step(null + weight * (known - null), timestep, tokens, source).prev_sample
    found = pipe.generate_tokens([1, 2], 5, guidance_scale=4.0, generator=one_generator(3))
    assert torch.equal(found, tokens)


def test_autoregressive_sampling_by_hand(tiny_autoencoder):
    """Catches groups drawn from the wrong state of the cache, against full passes without one."""
    pipe = build_pipeline(tiny_autoencoder, "autoregressive")
    scheduler = FlowMoTokenScheduler()
    scheduler.set_timesteps(8)
    tokens, source = torch.full((2, 8, 2), -1), one_generator(3)
    for position, weight in enumerate(scheduler.guidance_weights(4.0)):
        for group in range(2):
            with torch.no_grad():
                known, null = (pipe.generator(tokens, torch.tensor(ids)).logits for ids in ([1, 2], [3, 3]))
            logits = (null + weight * (known - null))[:, position, group]
            tokens[:, position, group] = scheduler.sample(logits, source)[0]
    assert torch.equal(pipe.generate_tokens([1, 2], guidance_scale=4.0, generator=one_generator(3)), tokens)


def test_samples_are_distributed_as_the_likelihoods(tiny_autoencoder):
    """Catches a draw whose distribution is not the model's: means of an autoregressive model's first group."""
    pipe = build_pipeline(tiny_autoencoder, "autoregressive")
    tokens = pipe.generate_tokens([1] * 3000, generator=one_generator())
    with torch.no_grad():
        p = pipe.generator(torch.full((1, 1, 2), -1), torch.tensor([1])).logits[0, 0, 0].softmax(-1)
    counts = tokens[:, 0, 0].bincount(minlength=8)
    assert ((counts - 3000 * p).square() / (3000 * p)).sum() < 24.3  # 0.1 % of draws of 8 values are further off


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine-power"])
def test_guidance_one_is_no_guidance(tiny_autoencoder, schedule):
    """Catches a second pass where there is nothing to guide, rounding it leaves, or a scale that is not used."""
    for order in ORDERS:
        pipe = build_pipeline(tiny_autoencoder, order, {"guidance_schedule": schedule})
        batches = []
        pipe.generator.register_forward_pre_hook(lambda module, args, batches=batches: batches.append(len(args[0])))
        options = steps_of(pipe)
        plain = pipe.generate_tokens([0, 1], **options, generator=one_generator())
        one = pipe.generate_tokens([0, 1], **options, guidance_scale=1.0, generator=one_generator())
        assert torch.equal(plain, one) and set(batches) == {2}
        batches.clear()
        guided = pipe.generate_tokens([0, 1], **options, guidance_scale=6.0, generator=one_generator())
        assert set(batches) == {4} and not torch.equal(guided, plain)
        assert pipe.guidance_scale == 6.0


def test_guidance_towards_no_class_changes_nothing(pipe):
    """Catches a null class that is another one in guidance than in the labels."""
    options = steps_of(pipe)
    plain = pipe.generate_tokens(None, **options, generator=one_generator())
    guided = pipe.generate_tokens([None], **options, guidance_scale=3.0, generator=one_generator())
    assert plain.shape == (1, 8, 2) and torch.equal(plain, guided)
    assert not torch.equal(plain, pipe.generate_tokens(0, **options, generator=one_generator()))


def test_batch_equals_singles(pipe):
    """Catches an image that depends on its neighbours, in its tokens, its noise or its decoding."""
    options = {**steps_of(pipe), **FAST, "guidance_scale": 2.0}
    batch = pipe([0, "dog", None], **options, generator=generators())
    assert batch.indices.shape == (3, 8, 2) and batch.images.shape == (3, 3, 16, 16)
    for i, (label, generator) in enumerate(zip([0, "dog", None], generators(), strict=True)):
        single = pipe(label, **options, generator=[generator])
        assert torch.equal(single.indices, batch.indices[i : i + 1])
        torch.testing.assert_close(single.images, batch.images[i : i + 1], rtol=0, atol=1e-5)
    alike = pipe([1, 1], **options, generator=generators(2)).indices
    assert not torch.equal(alike[0], alike[1])


def test_batches_of_decoding_do_not_matter(masked_pipe):
    """Catches noise that is drawn batch by batch, or images that are lost where batches do not come out even."""
    asked = []
    masked_pipe.autoencoder.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    options = {"num_inference_steps": 2, "decoder_guidance_scale": 1.0, "decoder_num_inference_steps": 2}
    labels = [0, 1, 2, 0, 1]
    whole = masked_pipe(labels, **options, output_type="pt", generator=one_generator()).images
    assert asked == [5, 5]
    for size, expected in ((1, [1] * 10), (2, [2, 2, 2, 2, 1, 1]), (9, [5, 5])):
        asked.clear()
        for kind in ("pt", "np", "pil", "latent"):
            part = masked_pipe(labels, **options, decode_batch_size=size, output_type=kind, generator=one_generator())
            assert len(part.images) == 5
            if kind == "pt":
                torch.testing.assert_close(part.images, whole, rtol=0, atol=1e-5)
        assert asked == expected * 4


def test_generators_decide(pipe):
    """Catches draws from the process's own generator where one is given."""
    options = steps_of(pipe)
    first, again, other = (pipe([0, 1], **options, **FAST, generator=one_generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.indices, again.indices) and torch.equal(first.images, again.images)
    assert not torch.equal(first.indices, other.indices)
    tokens = pipe.generate_tokens([0, 1], **options, generator=one_generator())
    assert torch.equal(tokens, first.indices) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < 8
    free = [pipe.generate_tokens([0, 1], **options) for _ in range(2)]
    assert not torch.equal(*free)


def test_images_are_decoded_from_the_tokens(masked_pipe):
    """Catches other noise, guidance or size in decoding than the tokenizer's own pipeline has."""
    source = one_generator()
    tokens = masked_pipe.generate_tokens([0, 1], 3, generator=source)
    tokenizer = FlowMoPipeline(masked_pipe.autoencoder, masked_pipe.scheduler)
    tokenizer.set_progress_bar_config(disable=True)
    decoding = {"guidance_scale": 2.0, "guidance_interval": (0.1, 2.0), "num_inference_steps": 3}
    expected = tokenizer.decode(tokens, 12, 20, **decoding, generator=source, output_type="pt")
    found = masked_pipe(
        [0, 1],
        12,
        20,
        3,
        decoder_num_inference_steps=3,
        decoder_guidance_scale=2.0,
        decoder_guidance_interval=(0.1, 2.0),
        generator=one_generator(),
        output_type="pt",
    )
    assert found.images.shape == (2, 3, 12, 20) and torch.equal(found.images, expected)


def test_outputs(masked_pipe):
    """Catches an output type that is not handed on, or a tuple in another order than the output class."""
    options = {"num_inference_steps": 2, "decoder_num_inference_steps": 1}
    images, indices = masked_pipe([0, 1], **options, return_dict=False, generator=one_generator())
    assert isinstance(images[0], PIL.Image.Image) and images[0].size == (16, 16) and indices.shape == (2, 8, 2)
    latent, pt, array = (
        masked_pipe([0, 1], **options, output_type=kind, generator=one_generator()).images
        for kind in ("latent", "pt", "np")
    )
    assert latent.min() < 0 and torch.equal(pt, latent / 2 + 0.5)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack(images), (array * 255).round().astype(np.uint8))
    assert not latent.requires_grad


def test_default_number_of_steps(pipe):
    """Catches another default than 64 steps, or one that an autoregressive generator refuses."""
    pipe.generate_tokens([0], generator=one_generator())
    assert pipe.num_timesteps == (64 if pipe.generator.config.order == "masked" else 8)
    if pipe.generator.config.order == "autoregressive":
        pipe.generate_tokens([0], num_inference_steps=8)


def test_an_autoregressive_token_passes_the_blocks_once(tiny_autoencoder):
    """Catches a cache that is not used: time would grow with the square of the tokens."""
    pipe, lengths = build_pipeline(tiny_autoencoder, "autoregressive"), []
    pipe.generator.blocks[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[:2]))
    pipe.generate_tokens([0, 1], guidance_scale=2.0)
    assert lengths == [(4, 1)] * 8


# Given tokens


def given_tokens(pipe: FlowMoGenerationPipeline, batch: int = 3) -> torch.Tensor:
    """Another share of each image, among them none and all."""
    tokens = random_indices(pipe.generator, batch, seed=9)
    tokens[0, 2:] = -1
    tokens[1, :, 0] = -1
    tokens[1, 3] = -1
    if batch > 2:
        tokens[2] = -1
    return tokens


def test_given_tokens_never_change(pipe):
    """Catches a given token that is drawn anew at some step, or one that is left masked at the end."""
    tokens, seen = given_tokens(pipe), []
    kept = tokens.clone()

    def callback(pipe, i, timestep, kwargs):
        seen.append(kwargs["latents"].clone())
        return {}

    found = pipe.generate_tokens(
        [0, 1, 2],
        **steps_of(pipe),
        guidance_scale=2.0,
        tokens=tokens,
        generator=generators(),
        callback_on_step_end=callback,
    )
    known = tokens != -1
    for step in [*seen, found]:
        assert torch.equal(step[known], tokens[known])
    assert (found >= 0).all() and torch.equal(seen[-1], found) and torch.equal(tokens, kept)
    assert (seen[0] == -1).any()
    if pipe.generator.config.order == "autoregressive":  # what is given further on was not there to be seen
        free = pipe.generate_tokens([0, 1, 2], guidance_scale=2.0, generator=generators())
        assert torch.equal(free[2], found[2])


def test_what_is_generated_fits_what_is_given(tiny_autoencoder):
    """Catches given tokens that are put in place only at the end."""
    for order in ORDERS:
        pipe = build_pipeline(tiny_autoencoder, order)
        tokens = torch.full((2, 8, 2), -1)
        tokens[0, :4], tokens[1, :4] = 1, 6
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]  # the same noise for both
        found = pipe.generate_tokens([0, 0], **steps_of(pipe), tokens=tokens, generator=generators)
        assert not torch.equal(found[0, 4:], found[1, 4:])


def test_one_image_is_given_to_all(pipe):
    """Catches tokens that are not broadcast, or are another image's."""
    tokens = given_tokens(pipe)[:1]
    options = {**steps_of(pipe), "generator": one_generator(1)}
    one = pipe.generate_tokens([0, 1, 2], **options, tokens=tokens)
    options["generator"] = one_generator(1)
    assert torch.equal(one, pipe.generate_tokens([0, 1, 2], **options, tokens=tokens.repeat(3, 1, 1)))
    assert torch.equal(one[:, :2], tokens[:, :2].repeat(3, 1, 1))


def test_all_tokens_given_come_back(pipe):
    """Catches a run that has nothing to do and changes something, in any type that tokens are stored as."""
    tokens = random_indices(pipe.generator)
    stored = tokens.numpy().astype(np.uint16)
    stored.flags.writeable = False
    for form in (tokens, tokens.int(), tokens.to(torch.uint8), tokens.to(torch.int8), tokens.numpy(), stored):
        found = pipe.generate_tokens([0, 1], **steps_of(pipe), tokens=form)
        assert found.dtype == torch.int64 and torch.equal(found, tokens)
    output = pipe([0, 1], **steps_of(pipe), tokens=tokens, **FAST)
    assert torch.equal(output.indices, tokens)


# Callbacks


def test_callbacks_see_replace_and_interrupt(pipe):
    """Catches a callback without its tensors, whose changes are lost, or that cannot end the generation."""
    seen = []

    def callback(caller, i, timestep, kwargs):
        assert caller is pipe and kwargs.keys() == {"latents"}
        seen.append((i, timestep.item(), (kwargs["latents"] == -1).sum().item()))
        pipe._interrupt = i == 1
        return {"latents": torch.full_like(kwargs["latents"], 5).index_fill(1, torch.tensor([7]), -1)} if i else {}

    output = pipe([0, 1], **steps_of(pipe), **FAST, callback_on_step_end=callback)
    count = pipe.num_timesteps
    assert [entry[:2] for entry in seen] == [(0, count - 1), (1, count - 2)] and seen[0][2] > seen[1][2] > 0
    assert (output.indices[:, :7] == 5).all() and (output.indices[:, 7] == -1).all()
    assert pipe.interrupt and torch.isfinite(output.images).all()
    assert (pipe.generate_tokens([0], **steps_of(pipe)) >= 0).all() and not pipe.interrupt


def test_replaced_tokens_are_what_goes_on(pipe):
    """Catches a replacement that the next step does not see."""

    def callback(pipe, i, timestep, kwargs):
        return {"latents": kwargs["latents"].index_fill(1, torch.tensor([0]), 7)}

    found = pipe.generate_tokens([0, 1], **steps_of(pipe), callback_on_step_end=callback)
    assert (found[:, 0] == 7).all() and (found >= 0).all()


def test_a_callback_changes_guidance(pipe, monkeypatch):
    """Catches a callback whose `_guidance_scale` is read by nothing."""
    weights = []
    plain = pipe._logits

    def logits(indices, labels, weight, *rest):
        weights.append(weight)
        return plain(indices, labels, weight, *rest)

    def callback(pipe, i, timestep, kwargs):
        pipe._guidance_scale = 3.0
        return {}

    monkeypatch.setattr(pipe, "_logits", logits)
    pipe.generate_tokens([0, 1], **steps_of(pipe), guidance_scale=2.0, callback_on_step_end=callback)
    asked = len(weights) // pipe.num_timesteps
    before, after = (pipe.token_scheduler.guidance_weights(scale) for scale in (2.0, 3.0))
    assert weights == [weight for weight in [before[0], *after[1:]] for _ in range(asked)]


def test_progress_bar_counts_steps(pipe, monkeypatch):
    """Catches a bar that never fills."""
    totals, updates = [], []

    class Bar:
        def update(self):
            updates.append(1)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(pipe, "progress_bar", lambda total: totals.append(total) or Bar())
    pipe.generate_tokens([0], **steps_of(pipe))
    assert totals == [len(updates)] == [pipe.num_timesteps]


# Classes


def test_classes_by_id_name_and_synonym(masked_pipe):
    """Catches names whose case, blanks or synonyms matter, or a string that is taken for a list."""
    assert masked_pipe.class_ids([0, "dog", " DOG ", "house cat", "Wild Cat", "tabby, house cat", None]) == [
        0,
        1,
        1,
        0,
        2,
        0,
        3,
    ]
    assert masked_pipe.class_ids("wild cat, tabby") == [2] and masked_pipe.class_ids(2) == [2]
    assert masked_pipe.class_ids(np.int64(2)) == [2] and masked_pipe.class_ids(np.array([1, 0])) == [1, 0]
    assert masked_pipe.class_ids(None) == [3] and masked_pipe.class_ids(range(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "class_labels is empty"),
        ([3], "class_labels has id 3; this generator has 3 classes"),
        (-1, "class_labels has id -1"),
        ("horse", "class_labels has 'horse', which is no class.*dog, house cat, tabby"),
        (["dog", "tabby"], r"'tabby', which is the name of the classes \[0, 2\]: give an id"),
        ("", "class_labels has ''"),
        (1.5, "class_labels has 1.5; expected ids, names or None"),
        ([1.0], "class_labels has 1.0; expected ids, names or None"),
        (True, "class_labels has True; expected"),
        ([[0]], r"class_labels has \[0\]; expected"),
    ],
)
def test_unknown_classes_are_refused(idle, labels, message):
    """Catches a class that is silently another one, or fails deep inside an embedding."""
    for call in (idle, idle.generate_tokens):
        with pytest.raises(ValueError, match=message):
            call(labels)


def test_classes_without_names(tiny_autoencoder):
    """Catches a model without names, or without classes, that fails otherwise than by saying so."""
    pipe = build_pipeline(tiny_autoencoder, id2label=None)
    with pytest.raises(ValueError, match="'dog', which is no class.*its names are: none"):
        pipe.class_ids("dog")
    pipe = build_pipeline(tiny_autoencoder, id2label=None, num_classes=0)
    assert pipe.generate_tokens([None, None], 2).shape == (2, 8, 2)
    with pytest.raises(ValueError, match="id 0; this generator has 0 classes"):
        pipe.class_ids(0)
    many = build_pipeline(tiny_autoencoder, num_classes=50, id2label={i: f"class {i}" for i in range(50)})
    with pytest.raises(ValueError, match=r"class 0, class 1, class 10.*, \.\.\.$"):
        many.class_ids("dog")


# Refusals


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.long), r"tokens have shape \(2, 8\); expected \(2, 8, 2\) or \(1, 8, 2\)"),
        (torch.zeros(3, 8, 2, dtype=torch.long), r"tokens have shape \(3, 8, 2\)"),
        (torch.zeros(2, 2, 8, dtype=torch.long), r"tokens have shape \(2, 2, 8\)"),
        (torch.zeros(2, 8, 2), "tokens have dtype torch.float32; expected whole numbers"),
        (torch.zeros(2, 8, 2).bool(), "tokens have dtype torch.bool"),
        (torch.full((2, 8, 2), 8), r"tokens range from 8 to 8; expected \[0, 8\), or -1"),
        (torch.full((2, 8, 2), -2), "tokens range from -2 to -2"),
        (np.full((1, 8, 2), 255, np.uint8), "tokens range from 255 to 255"),
    ],
)
def test_bad_tokens_are_refused(idle, tokens, message):
    """Catches tokens of another tokenizer or type that broadcast, wrap around or lose bits."""
    for call in (idle, idle.generate_tokens):
        with pytest.raises(ValueError, match=message):
            call([0, 1], tokens=tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"num_inference_steps": -2}, "num_inference_steps=-2 must be at least 1"),
        ({"generator": [torch.Generator()]}, "generator is a list of 1; expected one for each of 2 images"),
        ({"callback_on_step_end_tensor_inputs": ["logits"]}, "callback_on_step_end_tensor_inputs.*logits.*latents"),
        ({"decode_batch_size": 0}, "decode_batch_size=0 must be at least 1"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"height": 15}, "height"),
        ({"width": 0}, "width"),
        ({"decoder_num_inference_steps": 0}, "num_inference_steps=0"),
        ({"decoder_guidance_interval": (1.0, 0.5)}, "guidance_interval"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_runs(idle, arguments, message):
    """Catches an argument that is found out after the tokens are made, and with them lost."""
    with pytest.raises(ValueError, match=message):
        idle([0, 1], **arguments)


def test_steps_of_an_autoregressive_generator_are_its_tokens(tiny_autoencoder):
    """Catches a number of steps that is passed over, or leaves tokens out."""
    pipe = build_pipeline(tiny_autoencoder, "autoregressive")
    for steps in (7, 64):
        with pytest.raises(ValueError, match=f"num_inference_steps={steps}.*autoregressive.*tokens, 8; leave it out"):
            pipe.generate_tokens([0], steps)


@pytest.mark.parametrize("changes", [{"num_tokens": 9}, {"token_groups": 1}, {"group_bits": 2}])
def test_generators_of_other_tokens_are_refused(tiny_autoencoder, changes):
    """Catches a generator and a tokenizer that do not fit, found out in the middle of a run or not at all."""
    with pytest.raises(ValueError, match="autoencoder has 8 of 2 of 3.*another tokenizer"):
        build_pipeline(tiny_autoencoder, **changes)


def test_tokenizers_without_tokens_are_refused(tiny_config):
    """Catches a continuous autoencoder, whose latents no generator of bits can make."""
    for quantizer in ("kl", "none"):
        with pytest.raises(ValueError, match=f"quantizer='{quantizer}', whose tokens are not discrete"):
            build_pipeline(FlowMoAutoencoder(**tiny_config, quantizer=quantizer))


def test_tokenizers_of_several_levels_fit(tiny_config):
    """Catches groups counted in channels: FSQ's are of as many bits as its channels have."""
    fsq = FlowMoAutoencoder(**{**tiny_config, "quantizer": "fsq", "fsq_levels": 4, "codebook_bits": 4}).eval()
    pipe = build_pipeline(fsq, token_groups=3, group_bits=4)
    output = pipe([0, 1], num_inference_steps=3, **FAST, generator=one_generator())
    assert output.indices.shape == (2, 8, 3) and output.images.shape == (2, 3, 16, 16)


# Devices, dtypes, files


def test_components(masked_pipe):
    """Catches a pipeline that `from_pipe`, offloading or `to` cannot work with."""
    names = {"generator", "token_scheduler", "autoencoder", "scheduler"}
    assert set(masked_pipe.components) == names and masked_pipe._optional_components == []
    assert set(masked_pipe.model_cpu_offload_seq.split("->")) == {"generator", "autoencoder"}
    assert FlowMoGenerationPipeline(**masked_pipe.components).components == masked_pipe.components
    assert FlowMoGenerationPipeline.from_pipe(masked_pipe).generator is masked_pipe.generator
    tokenizer = FlowMoPipeline.from_pipe(masked_pipe)
    assert tokenizer.autoencoder is masked_pipe.autoencoder


def test_model_offload(pipe, monkeypatch):
    """Catches a model that is asked where it is not, or stays on the accelerator after a call."""
    options = {**steps_of(pipe), "guidance_scale": 2.0}
    expected = pipe([0, 1], **options, **FAST, generator=one_generator())
    pipe.enable_model_cpu_offload(device="cpu")
    found = pipe([0, 1], **options, **FAST, generator=one_generator())
    assert torch.equal(found.images, expected.images) and torch.equal(found.indices, expected.indices)
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    pipe.generate_tokens([0], **options)
    assert freed == [1]
    pipe([0], **options, **FAST)
    assert len(freed) == 3


def test_half_precision(pipe):
    """Catches logits that are guided or drawn in bfloat16, or an input in another dtype than the model."""
    dtypes = []
    step = pipe.token_scheduler.sample
    pipe.token_scheduler.sample = lambda logits, *args: dtypes.append(logits.dtype) or step(logits, *args)
    output = pipe.to(torch.bfloat16)([0, 1], **steps_of(pipe), **FAST, guidance_scale=2.0, generator=generators(2))
    assert set(dtypes) == {torch.float32}
    assert output.images.dtype == torch.float32 and torch.isfinite(output.images).all()


@both_orders
def test_round_trip_through_a_folder(tiny_autoencoder, tmp_path, order):
    """Catches a part, a name or a setting that is not saved."""
    pipe = build_pipeline(tiny_autoencoder, order, {"noise_temperature": 1.0}, tokenizer="abc")
    pipe.scheduler = FlowMoScheduler(rho=2.0)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "FlowMoGenerationPipeline"
    assert index["generator"] == ["flowmo_diffusers", "FlowMoTokenGenerator"]
    assert index["token_scheduler"] == ["flowmo_diffusers", "FlowMoTokenScheduler"]

    loaded = FlowMoGenerationPipeline.from_pretrained(tmp_path)
    assert loaded.generator.config.id2label == NAMES and loaded.generator.config.tokenizer == "abc"
    assert loaded.token_scheduler.config.noise_temperature == 1.0 and loaded.scheduler.config.rho == 2.0
    # Weights read from a file lie unaligned in memory, where the last bit of a product may differ; a copy does not.
    loaded = FlowMoGenerationPipeline(**{name: copy.deepcopy(part) for name, part in loaded.components.items()})
    loaded.set_progress_bar_config(disable=True)
    options = {**steps_of(pipe), **FAST, "guidance_scale": 2.0}
    found = [p(["dog", "wild cat"], **options, generator=generators(2)) for p in (pipe, loaded)]
    assert torch.equal(found[0].indices, found[1].indices) and torch.equal(found[0].images, found[1].images)
    alone = FlowMoTokenGenerator.from_pretrained(tmp_path, subfolder="generator")
    assert alone.config.order == order


def test_loading_in_another_dtype(masked_pipe, tmp_path):
    """Catches `dtype=` that is not passed on to both models."""
    masked_pipe.save_pretrained(tmp_path)
    loaded = FlowMoGenerationPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.generator.dtype == loaded.autoencoder.dtype == torch.bfloat16
    loaded.set_progress_bar_config(disable=True)
    assert torch.isfinite(loaded(["dog"], num_inference_steps=2, **FAST).images).all()


def test_parts_can_be_given_or_left_out(masked_pipe, tmp_path):
    """Catches a loader that reads a part it was given, or needs one it was told to leave out."""
    masked_pipe.save_pretrained(tmp_path)
    scheduler = FlowMoTokenScheduler(temperature=0.5)
    loaded = FlowMoGenerationPipeline.from_pretrained(tmp_path, token_scheduler=scheduler, autoencoder=None)
    assert loaded.token_scheduler is scheduler and loaded.autoencoder is None
    assert loaded.generate_tokens(["dog"], 2).shape == (1, 8, 2)


def test_other_checkpoints_are_refused(masked_pipe, tiny_pipeline, tmp_path):
    """Catches a checkpoint of which whatever has a known name is loaded, or pickles that are read."""
    masked_pipe.save_pretrained(tmp_path / "generation")
    tiny_pipeline.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="checkpoint of a FlowMoGenerationPipeline, not of a FlowMoPipeline"):
        FlowMoPipeline.from_pretrained(tmp_path / "generation")
    with pytest.raises(ValueError, match="checkpoint of a FlowMoPipeline, not of a FlowMoGenerationPipeline"):
        FlowMoGenerationPipeline.from_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="safetensors only"):
        FlowMoGenerationPipeline.from_pretrained(tmp_path / "generation", use_safetensors=False)
