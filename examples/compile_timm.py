"""A network of timm through the compiler backend: `python examples/compile_timm.py` takes a training step."""

import timm
import torch

import fastres

torch.manual_seed(0)
model = timm.create_model("seresnet18", num_classes=10)
compiled = torch.compile(model, backend="fastres")  # no import of fastres needed; fastres.compile(model) is the same

images, labels = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
torch.nn.functional.cross_entropy(compiled(images), labels).backward()
print(fastres.compile_report())  # what became of each pattern
