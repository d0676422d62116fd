"""The network at work: one step of training, and the evaluation. When each is due is the loop's business."""

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from fastres.train.augment import Mixing, RandAugment, augment, augmentation_of, erase, flip_bits, normalise
from fastres.train.averages import Lookahead, averaged_model
from fastres.train.data import batches
from fastres.train.diagnosis import diagnose
from fastres.train.errors import DivergedError
from fastres.train.parallel import loss_weight, share_buffers, spread, without_reduction
from fastres.train.precision import AMP_DTYPES
from fastres.train.prepare import Run


class Position(NamedTuple):
    """Where in the run a step of training is."""

    step: int  # from 0
    total_steps: int
    epoch: int  # from 0
    images: Tensor  # int64 [N], the batch's indices into the training images


class Evaluation(NamedTuple):
    """What the network makes of the test images."""

    loss: float  # mean cross-entropy
    accuracy: float
    logits: Tensor  # float32 [N_test, classes], on the CPU, in the order of the test images


class Engine:
    """Steps and evaluations of one run; `train_metrics` holds what the steps of an epoch have seen so far.

    Raises:
        InputError: options that do not fit the network or the images.
    """

    def __init__(self, run: Run) -> None:
        self.config, self.data, self.device = run.config, run.data, run.device
        self.model, self.optimizer, self.generator = run.model, run.optimizer, run.generator
        self.group = run.group
        config = self.config
        self.augmentation = augmentation_of(config, self.data.augmentation, self.data.image_size)
        self.flip_bits = flip_bits(len(self.data.train), config.seed) if config.flip == "alternating" else None
        self.rand_augment = RandAugment(*config.randaugment) if config.randaugment else None
        self.mixing = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mixing = Mixing(config.mixup, config.cutmix, len(self.data.classes))
        # Evaluation calls the network itself: its processes have different numbers of batches.
        self.forward = torch.compile(self.model, mode=config.compile_mode) if config.compile else self.model
        self.compute = spread(
            self.forward, self.group, self.device, static_graph=config.accumulate == 1, sync_bn=config.sync_bn
        )
        self.amp = torch.autocast(self.device.type, AMP_DTYPES[config.amp], enabled=config.amp != "none")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.averaged = None if config.ema_decay is None else averaged_model(self.model, config.ema_decay)
        self.lookahead = (
            None if config.lookahead_period is None
            else Lookahead(self.model, config.lookahead_period, config.lookahead_decay)
        )  # fmt: skip
        # Whether a step looks at its loss. On a GPU that would make it wait, so the loop looks at many together.
        self.watchful = self.device.type == "cpu"
        # Every process counts the whole batch in training; what it counts of the test images is added up.
        self.train_metrics = self._metrics()

    def state_dict(self) -> dict[str, Any]:
        """What changes while training besides the network and the optimizer: averages of weights, the loss's scale."""
        parts = {"averaged": self.averaged, "lookahead": self.lookahead}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, of an engine with the same configuration."""
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        if self.lookahead is not None:
            self.lookahead.load_state_dict(state["lookahead"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def train_step(self, images: Tensor, labels: Tensor, lr: float, at: Position) -> Tensor:
        """Augment, forward, backward, a step of the optimizer, averages of the weights.

        The accuracy that `trained` gives counts a mixed image as right where the network names the class of its larger
        part, as torchvision's reference does.

        Args:
            images: uint8 [N, C, H, W], as the data set has them; the batch of all processes.
            labels: int64 [N].
            lr: learning rate of this step.
            at: where in the run this step is.

        Returns:
            The mean loss of the batch, on the device, without a graph.
        """
        count = len(images)
        x, targets = self._batch(images, labels, at)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        self.optimizer.zero_grad()
        loss, logits = self._gradients(x, targets, count)
        labels = targets if targets.dim() == 1 else targets.argmax(1)
        if self.group.size > 1:
            right = (logits.argmax(1) == labels).sum()
            loss, right = self.group.sum(torch.stack([loss.float() / self.group.size, right.float()]))
        if self.watchful and not math.isfinite(loss.item()):  # in all processes alike
            raise DivergedError(self._diverged(loss.item(), x, targets, lr, at))
        self._update(at)
        if self.group.size == 1:
            self.train_metrics["accuracy"].update(logits, labels)
        else:
            # As many predictions that are right as there were in all shares.
            predictions = torch.arange(count, device=self.device) < right
            self.train_metrics["accuracy"].update(predictions.long(), torch.ones_like(predictions).long())
        self.train_metrics["loss"].update(loss.expand(count))
        return loss

    def _batch(self, images: Tensor, labels: Tensor, at: Position) -> tuple[Tensor, Tensor]:
        """This process's share of a batch, as the network takes it, and its targets: int64 [share of N]; where images
        are mixed, float32 [share of N, classes]."""
        config, count, own = self.config, len(images), self.group.share(len(images))
        share: slice | Tensor = own
        if self.mixing is not None and self.group.size > 1:
            share = self.mixing.needed(own, count)
            if not isinstance(self.data.train.images, Tensor):
                # Only the process's own images are decoded; the one before them is another's last.
                images[own.start - 1] = self.group.gather(images[own.stop - 1])[self.group.rank - 1]
        flipped = None if self.flip_bits is None else self.flip_bits[at.images] ^ bool(at.epoch % 2)
        images = augment(images, self.augmentation, self.generator, share, flipped=flipped)
        if self.rand_augment is not None:
            images = self.rand_augment(images, self.generator, count, share)
        x, targets = self._input(images), labels[share].to(self.device)
        if config.random_erasing > 0:
            x = erase(x, config.random_erasing, self.generator, count, share)
        if self.mixing is not None:
            x, targets = self.mixing(x, targets, self.generator)
            if self.group.size > 1:
                x, targets = x[1:], targets[1:]
        return x, targets

    def _diverged(self, loss: float, x: Tensor, targets: Tensor, lr: float, at: Position) -> str:
        def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)

        with self.amp:
            found = diagnose(self.model, x, targets, loss_of, self.group)
        return (
            f"the loss is {loss} at step {at.step + 1} (epoch {at.epoch + 1}), with an lr of {lr:g}: {found.what}; "
            "the last checkpoint is of before; try a lower lr"
        )

    def _gradients(self, x: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the share's parts; `count` images in all shares. Returns the loss and the logits."""
        # As many parts in every process, and two images a part, for their batch statistics.
        parts = max(1, min(self.config.accumulate, count // (2 * self.group.size)))
        losses, outputs = [], []
        for index, (part, wanted) in enumerate(
            zip(x.tensor_split(parts), targets.tensor_split(parts), strict=True), start=1
        ):
            with contextlib.nullcontext() if index == parts else without_reduction(self.compute):
                with self.amp:
                    logits = self.compute(part)
                    loss = F.cross_entropy(logits, wanted, label_smoothing=self.config.label_smoothing)
                    if parts > 1:
                        loss = loss * (len(part) / len(x))
                    if self.group.size > 1:
                        loss = loss * loss_weight(self.group, count)
                torch.autograd.backward(self.scaler.scale(loss))
            losses.append(loss.detach())
            outputs.append(logits.detach())
        return (losses[0], outputs[0]) if parts == 1 else (torch.stack(losses).sum(), torch.cat(outputs))

    def _update(self, at: Position) -> None:
        """From gradients to weights."""
        config = self.config
        trained = config.whitening_bias_epochs
        if trained is not None and at.step >= trained * at.total_steps / (config.epochs or 1):
            # Without a gradient the optimizer skips it. DDP and torch.compile see the same parameters as before.
            self.model.get_submodule("whitening").bias.grad = None
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        if self.lookahead is not None:
            self.lookahead.update(at.step + 1, at.total_steps)

    def trained(self) -> dict[str, float]:
        """Mean loss and accuracy over the images of the epoch's steps so far."""
        return self._values(self.train_metrics)

    @torch.no_grad()
    def evaluate(self, interrupted: Callable[[], bool]) -> Evaluation | None:
        """The network, or the average of its weights where there is one, on the test images; None where `interrupted`
        in between."""
        self.model.eval()
        net = self.forward if self.averaged is None else self.averaged.eval()
        share_buffers(self.model if self.averaged is None else self.averaged, self.group)
        test, size = self.data.test, self.config.eval_batch_size
        share = torch.arange(len(test))[self.group.share(len(test))]
        steps = batches(test, share, size, workers=self.config.workers)
        # As many rounds in every process, since an interruption is everybody's.
        rounds = math.ceil(math.ceil(len(test) / self.group.size) / size)
        hidden = None if self.group.is_main else True
        found = [torch.empty(0, len(self.data.classes))]
        with tqdm(total=len(share), desc="evaluation", unit="img", leave=False, disable=hidden) as bar:
            for _ in range(rounds):
                if self.group.any(interrupted()):
                    return None
                images, _labels = next(steps, (None, None))
                if images is None:
                    continue
                with self.amp:
                    found.append(self._averaged_logits(net, self._input(images)).float().cpu())
                bar.update(len(images))
        logits, labels = torch.cat(self.group.gather(torch.cat(found))), test.labels.cpu()
        loss = F.cross_entropy(logits.double(), labels).item()
        return Evaluation(loss, (logits.argmax(1) == labels).double().mean().item(), logits)

    def _averaged_logits(self, net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Logits, averaged over the views of each image that the option tta names.

        Source: Jordan 2024, section 3.7.
        """
        tta = self.config.tta

        def both_ways(view: Tensor) -> Tensor:
            return 0.5 * net(view) + 0.5 * net(view.flip(-1))

        if tta == "none":
            return net(x)
        if tta == "flip":
            return both_ways(x)
        padded, (height, width) = F.pad(x, (1,) * 4, "reflect"), x.shape[-2:]
        moved = (padded[:, :, i : i + height, i : i + width] for i in (0, 2))
        return 0.5 * both_ways(x) + 0.25 * sum(both_ways(view) for view in moved)

    @staticmethod
    def _values(metrics: MetricCollection) -> dict[str, float]:
        with warnings.catch_warnings():
            # Metrics that are all restored, after a resume at the end of an epoch, are unused to torchmetrics.
            warnings.filterwarnings("ignore", message=".*called before the ``update`` method")
            return {name: value.item() for name, value in metrics.compute().items()}

    def _input(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device), self.data.mean, self.data.std, channels_last=self.config.channels_last)

    def _metrics(self) -> MetricCollection:
        accuracy = MulticlassAccuracy(
            num_classes=len(self.data.classes), average="micro", validate_args=False, sync_on_compute=False
        )
        # NaN is reported by the loop itself, with its step. MeanMetric without its check ignores weights, so a batch's
        # mean loss is given once for each image.
        metrics = MetricCollection(
            {"loss": MeanMetric(nan_strategy="disable", sync_on_compute=False), "accuracy": accuracy},
            compute_groups=False,
        )
        metrics.persistent(True)
        return metrics.to(self.device)
