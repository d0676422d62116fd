"""The network at work: one step of training, and the evaluation. When each is due is the loop's business."""

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from fastres.train.data import augment, batches, normalise
from fastres.train.parallel import loss_weight, share_buffers, spread
from fastres.train.prepare import Run


class Engine:
    """Steps and evaluations of one run; `train_metrics` holds what the steps of an epoch have seen so far."""

    def __init__(self, run: Run) -> None:
        self.config, self.data, self.device = run.config, run.data, run.device
        self.model, self.optimizer, self.generator = run.model, run.optimizer, run.generator
        self.group = run.group
        # Evaluation calls the network itself: its processes have different numbers of batches.
        self.forward = torch.compile(self.model) if self.config.compile else self.model
        self.compute = spread(self.forward, self.group, self.device, static_graph=True, sync_bn=self.config.sync_bn)
        self.amp = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16")
        # Every process counts the whole batch in training; what it counts of the test images is added up.
        self.train_metrics, self.test_metrics = self._metrics(sync_on_compute=False), self._metrics()

    def train_step(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """Augment, forward, backward, a step of the optimizer.

        Args:
            images: uint8 [N, C, H, W], as the data set has them; the batch of all processes.
            labels: int64 [N].
            lr: learning rate of this step.

        Returns:
            The mean loss of the batch, on the device, without a graph.
        """
        count, share = len(images), self.group.share(len(images))
        x = self._input(augment(images, self.data.augmentation, self.generator, share))
        labels = labels[share].to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.amp:
            logits = self.compute(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            if self.group.size > 1:
                loss = loss * loss_weight(self.group, count)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        loss = loss.detach()
        if self.group.size == 1:
            self.train_metrics["accuracy"].update(logits.detach(), labels)
        else:
            right = (logits.detach().argmax(1) == labels).sum()
            loss, right = self.group.sum(torch.stack([loss.float() / self.group.size, right.float()]))
            # As many predictions that are right as there were in all shares.
            predictions = torch.arange(count, device=self.device) < right
            self.train_metrics["accuracy"].update(predictions.long(), torch.ones_like(predictions).long())
        self.train_metrics["loss"].update(loss.expand(count))
        return loss

    def trained(self) -> dict[str, float]:
        """Mean loss and accuracy over the images of the epoch's steps so far."""
        return self._values(self.train_metrics)

    @torch.no_grad()
    def evaluate(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Mean cross-entropy and accuracy over the test images; None where `interrupted` in between."""
        self.model.eval()
        share_buffers(self.model, self.group)
        self.test_metrics.reset()
        test, size = self.data.test, self.config.eval_batch_size
        share = torch.arange(len(test))[self.group.share(len(test))]
        steps = batches(test, share, size, workers=self.config.workers)
        # As many rounds in every process, since an interruption is everybody's.
        rounds = math.ceil(math.ceil(len(test) / self.group.size) / size)
        hidden = None if self.group.is_main else True
        with tqdm(total=len(share), desc="evaluation", unit="img", leave=False, disable=hidden) as bar:
            for _ in range(rounds):
                if self.group.any(interrupted()):
                    return None
                images, labels = next(steps, (None, None))
                if images is None or labels is None:
                    continue
                labels = labels.to(self.device)
                with self.amp:
                    logits = self.forward(self._input(images))
                    loss = F.cross_entropy(logits, labels)
                self.test_metrics["loss"].update(loss.expand(len(labels)))
                self.test_metrics["accuracy"].update(logits, labels)
                bar.update(len(labels))
        return self._values(self.test_metrics)

    @staticmethod
    def _values(metrics: MetricCollection) -> dict[str, float]:
        with warnings.catch_warnings():
            # Metrics that are all restored, after a resume at the end of an epoch, or all another process's, are unused
            # to torchmetrics.
            warnings.filterwarnings("ignore", message=".*called before the ``update`` method")
            return {name: value.item() for name, value in metrics.compute().items()}

    def _input(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device), self.data.mean, self.data.std, channels_last=self.config.channels_last)

    def _metrics(self, *, sync_on_compute: bool = True) -> MetricCollection:
        accuracy = MulticlassAccuracy(
            num_classes=len(self.data.classes), average="micro", validate_args=False, sync_on_compute=sync_on_compute
        )
        # NaN is reported by the loop itself, with its step. MeanMetric without its check ignores weights, so a batch's
        # mean loss is given once for each image.
        metrics = MetricCollection(
            {"loss": MeanMetric(nan_strategy="disable", sync_on_compute=sync_on_compute), "accuracy": accuracy},
            compute_groups=False,
        )
        metrics.persistent(True)
        return metrics.to(self.device)
