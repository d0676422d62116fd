"""The network at work: one step of training, and the evaluation. When each is due is the loop's business."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from fastres.train.data import augment, batches, normalise
from fastres.train.prepare import Run


class Engine:
    """Steps and evaluations of one run; `train_metrics` holds what the steps of an epoch have seen so far."""

    def __init__(self, run: Run) -> None:
        self.config, self.data, self.device = run.config, run.data, run.device
        self.model, self.optimizer, self.generator = run.model, run.optimizer, run.generator
        self.compute = torch.compile(self.model) if self.config.compile else self.model
        self.amp = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16")
        self.train_metrics, self.test_metrics = self._metrics(), self._metrics()

    def train_step(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """Augment, forward, backward, a step of the optimizer.

        Args:
            images: uint8 [N, C, H, W], as the data set has them.
            labels: int64 [N].
            lr: learning rate of this step.

        Returns:
            The mean loss of the batch, on the device, without a graph.
        """
        x = augment(images, self.data.augmentation, self.generator)
        x = self._input(x)
        labels = labels.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.amp:
            logits = self.compute(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        loss = loss.detach()
        self.train_metrics["loss"].update(loss.expand(len(labels)))
        self.train_metrics["accuracy"].update(logits.detach(), labels)
        return loss

    def trained(self) -> dict[str, float]:
        """Mean loss and accuracy over the images of the epoch's steps so far."""
        with warnings.catch_warnings():
            # After a resume at the end of an epoch the metrics are all restored, which torchmetrics takes for unused.
            warnings.filterwarnings("ignore", message=".*called before the ``update`` method")
            return {name: value.item() for name, value in self.train_metrics.compute().items()}

    @torch.no_grad()
    def evaluate(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Mean cross-entropy and accuracy over the test images; None where `interrupted` in between."""
        self.model.eval()
        self.test_metrics.reset()
        test = self.data.test
        steps = batches(test, torch.arange(len(test)), self.config.eval_batch_size, workers=self.config.workers)
        with tqdm(total=len(test), desc="evaluation", unit="img", leave=False, disable=None) as bar:
            for images, labels in steps:
                if interrupted():
                    return None
                labels = labels.to(self.device)
                with self.amp:
                    logits = self.compute(self._input(images))
                    loss = F.cross_entropy(logits, labels)
                self.test_metrics["loss"].update(loss.expand(len(labels)))
                self.test_metrics["accuracy"].update(logits, labels)
                bar.update(len(labels))
        return {name: value.item() for name, value in self.test_metrics.compute().items()}

    def _input(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device), self.data.mean, self.data.std, channels_last=self.config.channels_last)

    def _metrics(self) -> MetricCollection:
        accuracy = MulticlassAccuracy(num_classes=len(self.data.classes), average="micro", validate_args=False)
        # NaN is reported by the loop itself, with its step. MeanMetric without its check ignores weights, so a batch's
        # mean loss is given once for each image.
        metrics = MetricCollection(
            {"loss": MeanMetric(nan_strategy="disable"), "accuracy": accuracy}, compute_groups=False
        )
        metrics.persistent(True)
        return metrics.to(self.device)
