"""What random operations on batches compute, against closed forms and torchvision's transforms one image at a time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from fastres.train import ImageData, Summary
from fastres.train.augment import Mixing, RandAugment, augment, drawn_from, erase
from fastres.train.distributed import Group
from fastres.train.engine import Engine, Position
from tests.oracle import generator as fresh
from tests.train.conftest import make_data
from tests.train.test_engine import make_engine, step

Run = Callable[..., Summary]
ALL: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0, "randaugment": (2, 9), "random_erasing": 0.5}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (64, 3, 12, 10), dtype=torch.uint8, generator=fresh("augment"))


def test_global_generator_goes_on_as_if_nothing_was_drawn() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn = []
    for seed in (5, 5, 6):
        with drawn_from(seeded(seed)):
            drawn.append(torch.rand(3))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# --- mixup and cutmix ---


@pytest.mark.parametrize("seed", range(4))
def test_mixup_is_the_formula(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = fresh("mixup", seed)
    weight = float(torch.rand((), generator=inputs))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.tensor([weight]))
    x, labels = torch.randn(2, 3, 6, 5, generator=inputs), torch.tensor([2, 0])
    mixed, targets = Mixing(0.2, 0.0, 4)(x, labels, seeded(seed))
    wide = x.double()
    expected = torch.stack([weight * wide[0] + (1 - weight) * wide[1], weight * wide[1] + (1 - weight) * wide[0]])
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(targets, torch.tensor([[1 - weight, 0, weight, 0], [weight, 0, 1 - weight, 0]]))


def test_mixups_lambda_is_betas() -> None:
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)); 2,000 draws stay within five standard errors."""
    alpha, generator = 0.4, seeded(3)
    mixing = Mixing(alpha, 0.0, 2)
    found = torch.stack([mixing(torch.zeros(2, 3, 1, 1), torch.arange(2), generator)[1][0, 0] for _ in range(2000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(found.mean() - 0.5) < 5 * (variance / len(found)) ** 0.5
    # The square of a number in 0..1 varies by at most 1/4.
    assert abs(((found - 0.5) ** 2).mean() - variance) < 5 * 0.25 / len(found) ** 0.5


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_weighs_labels_by_the_area_of_its_box(seed: int) -> None:
    """Boxes that reach over the border are cut off there."""
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 7, 9).contiguous()
    mixed, targets = Mixing(0.0, 1.0, 3)(x, torch.arange(3), fresh("cutmix", seed))
    before = x.roll(1, 0)
    assert bool(((mixed == x) | (mixed == before)).all())
    box = mixed[0, 0] == before[0, 0]
    rows, columns = box.any(1), box.any(0)
    assert torch.equal(box, rows[:, None] & columns[None])  # a rectangle
    for side in (rows, columns):
        assert int(side.int().diff().abs().sum()) <= 2  # without gaps
    for index in range(3):
        assert torch.equal(mixed[index] == before[index], box.expand(3, -1, -1))
        kept = 1 - float(box.float().mean())
        assert targets[index, index].item() == pytest.approx(kept)
        assert targets[index, index - 1].item() == pytest.approx(1 - kept)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))


def test_one_of_the_two_is_drawn_for_each_batch() -> None:
    """200 batches stay within five standard deviations of a half."""
    x, labels, generator = torch.rand(4, 3, 8, 8, generator=fresh("one of two")), torch.arange(4), seeded(2)
    mixing = Mixing(1.0, 1.0, 4)
    # Only mixup makes colours that neither image has.
    cut = [bool(((m := mixing(x, labels, generator)[0]) == x).logical_or(m == x.roll(1, 0)).all()) for _ in range(200)]
    assert abs(sum(cut) - 100) < 5 * 50**0.5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [6, 7])
def test_shares_are_mixed_with_images_of_the_whole_batch(size: int, count: int) -> None:
    for kind in ((0.3, 0.0), (0.0, 1.0)):
        x, labels = torch.rand(count, 3, 8, 8, generator=fresh("shares", size, count)), torch.arange(count)
        mixing = Mixing(*kind, count)
        whole = mixing(x, labels, seeded(9))
        for rank in range(size):
            share = Group(rank, size).share(count)
            needed = mixing.needed(share, count)
            mixed, targets = mixing(x[needed], labels[needed], seeded(9))
            assert torch.equal(mixed[1:], whole[0][share]) and torch.equal(targets[1:], whole[1][share])


# --- RandAugment and random erasing ---


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_each_image_gets_torchvisions_operations_of_its_own(images: Tensor, magnitude: int) -> None:
    """Image by image, with the same draws."""
    found = RandAugment(2, magnitude)(images, seeded(4), len(images))
    generator, theirs = seeded(4), v2.RandAugment(2, magnitude)
    space = list(theirs._AUGMENTATION_SPACE.items())
    operations = torch.randint(len(space), (2, len(images)), generator=generator)
    negative = torch.rand(2, len(images), generator=generator) < 0.5
    seen = set()
    for index, image in enumerate(images):
        for operation, sign in zip(operations[:, index].tolist(), negative[:, index].tolist(), strict=True):
            name, (magnitudes, signed) = space[operation]
            values = magnitudes(31, 12, 10)
            value = 0.0 if values is None else float(values[magnitude]) * (-1 if signed and sign else 1)
            image = theirs._apply_image_or_video_transform(image, name, value, theirs.interpolation, theirs._fill)
            seen.add(name)
        assert torch.equal(found[index], image)
    assert len(seen) == len(space)


@pytest.mark.parametrize("operation", [lambda x, *a: RandAugment(3, 20)(x, *a), lambda x, *a: erase(x * 1.0, 0.5, *a)])
def test_a_share_gets_what_it_would_get_of_the_whole(operation: Callable[..., Tensor], images: Tensor) -> None:
    before, generators = images.clone(), [seeded(6) for _ in range(4)]
    whole = operation(images, generators[0], len(images))
    assert not torch.equal(whole, images)
    for share, generator in zip((slice(0, 20), slice(20, 64), torch.tensor([63, 0, 5])), generators[1:], strict=True):
        assert torch.equal(operation(images[share], generator, len(images), share), whole[share])
        assert torch.equal(generator.get_state(), generators[0].get_state())
    assert torch.equal(images, before)


def test_erased_are_rectangles_of_the_sizes_asked() -> None:
    count, height, width = 400, 32, 24
    x = torch.ones(count, 3, height, width)
    found = erase(x, 0.25, seeded(8), count) == 0
    erased = found.flatten(1).any(1)
    assert abs(int(erased.sum()) - 100) < 5 * (count * 0.25 * 0.75) ** 0.5
    for box in found[erased]:
        assert torch.equal(box[0], box[1]) and torch.equal(box[0], box[2])
        rows, columns = box[0].any(1), box[0].any(0)
        assert torch.equal(box[0], rows[:, None] & columns[None])
        h, w = int(rows.sum()), int(columns.sum())
        # A side is rounded to whole pixels: half a pixel each way.
        assert (h - 0.5) * (w - 0.5) <= 0.33 * height * width and (h + 0.5) * (w + 0.5) >= 0.02 * height * width
        assert (h - 0.5) / (w + 0.5) <= 3.3 and (h + 0.5) / (w - 0.5) >= 0.3


# --- in a step of training ---


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_mixed_images_is_that_of_their_soft_targets(
    accumulate: int, smoothing: float, data: ImageData, tmp_path: Path
) -> None:
    """In float64, by hand. Parts of a batch are mixed as the whole; the larger part of an image counts as its class."""
    engines = [
        make_engine(tmp_path, data, mixup=0.5, accumulate=accumulate, label_smoothing=smoothing, lr=0.1)
        for _ in range(2)
    ]
    for engine in engines:
        engine.model.eval()
        with torch.no_grad():
            engine.model.get_parameter("6.bias")[0] += 3.0  # so that most predictions are class 0
    assert isinstance(data.train.images, Tensor)
    images, labels, at = data.train.images[:9], torch.arange(9) % 2, Position(0, 10, 0, torch.arange(9))
    x, targets = engines[1]._batch(images, labels, at)
    assert targets.shape == (9, 3) and bool(((targets[1:] > 0).sum(1) == 2).all())
    with torch.no_grad():
        logarithms = engines[1].model.double()(x.double()).log_softmax(1)
    smooth = (1 - smoothing) * targets.double() + smoothing / 3
    expected = -(smooth * logarithms).sum(1).mean().item()
    assert engines[0].train_step(images, labels, 0.1, at).item() == pytest.approx(expected, rel=1e-5)
    right = (logarithms.argmax(1) == targets.argmax(1)).double().mean().item()
    assert right > 0.2 and engines[0].trained()["accuracy"] == pytest.approx(right)


@pytest.mark.usefixtures("tiny_models")
def test_options_that_are_not_given_draw_nothing(data: ImageData, tmp_path: Path) -> None:
    """A run goes on with the random numbers that it would have had before the options were there."""
    engine = make_engine(tmp_path, data)
    step(engine)
    generator = seeded(engine.config.seed)
    augment(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), engine.augmentation, generator)
    assert torch.equal(engine.generator.get_state(), generator.get_state())


@pytest.mark.parametrize("fields", [{name: value} for name, value in ALL.items()] + [ALL], ids=lambda f: "-".join(f))
def test_each_option_changes_the_run_and_its_seed_decides_how(run: Run, tmp_path: Path, fields: dict[str, Any]) -> None:
    def weights(to: str, **fields: Any) -> Tensor:
        run(to, epochs=1, dropout=0.2, **fields)
        return torch.cat([v.flatten() for v in torch.load(tmp_path / to / "last.pt")["model"].values()])

    one = weights("one", **fields)
    assert torch.equal(one, weights("same", **fields))
    assert not torch.equal(one, weights("none"))
    assert not torch.equal(one, weights("seed", **fields, seed=1))


@pytest.mark.parametrize("more", [{}, {"amp": "bf16", "flip": "alternating", "accumulate": 2, "ema_decay": 0.9}])
def test_stopped_run_ends_with_the_same_weights(run: Run, tmp_path: Path, more: dict[str, Any]) -> None:
    fields = {**ALL, "dropout": 0.3, "label_smoothing": 0.1, **more}
    run("whole", **fields)
    run("part", **fields, max_steps=4)
    run("part", **fields, resume=tmp_path / "part")
    whole, part = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "part"))
    torch.testing.assert_close(part["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(part["engine"], whole["engine"], rtol=0, atol=0)
    assert torch.equal(part["generator"], whole["generator"])


@pytest.mark.usefixtures("tiny_models")
def test_neighbour_of_a_share_comes_from_the_process_that_decoded_it(tmp_path: Path) -> None:
    """Images that are not in memory are undefined outside a process's own share."""
    data = make_data(12, 4)
    assert isinstance(data.train.images, Tensor)
    images, labels = data.train.images, data.train.labels
    at = Position(0, 10, 0, torch.arange(12))
    whole = make_engine(tmp_path, data, **ALL)._batch(images.clone(), labels, at)
    sizes = [Group(rank, 3).share(12) for rank in range(3)]

    class Peer(Group):
        def gather(self, value: Any) -> list[Any]:
            assert torch.equal(value, images[self.share(12).stop - 1])
            return [images[share.stop - 1] for share in sizes]

    for rank, share in enumerate(sizes):
        engine: Engine = make_engine(tmp_path, data, **ALL)
        engine.group = Peer(rank, 3)
        engine.data = dataclasses.replace(data, train=dataclasses.replace(data.train, images=object()))
        mine = torch.full_like(images, 77)
        mine[share] = images[share]
        x, targets = engine._batch(mine, labels, at)
        torch.testing.assert_close(x, whole[0][share], rtol=0, atol=0)
        assert torch.equal(targets, whole[1][share])


@pytest.mark.usefixtures("tiny_models")
def test_loss_that_diverges_on_mixed_images_is_explained(data: ImageData, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, data, **ALL)
    with torch.no_grad():
        engine.model.get_parameter("6.weight").fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"6\.weight holds"):
        step(engine)
