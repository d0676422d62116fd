"""A network of fastres in place of torchvision's: `python examples/drop_in.py` trains it for a few steps."""

import torch
import torchvision

from fastres import FusedResNet18, reuse_cpu_memory

reuse_cpu_memory()  # large buffers stay with the process: no page faults at every step
torch.manual_seed(0)
model = FusedResNet18(num_classes=10)  # stem="cifar" for 32 pixels; stem="imagenet" has torchvision's first layers
model = model.to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)

images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
for step in range(3):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

# Names and shapes are torchvision's, but for a first convolution of 3x3 where the stem is CIFAR's.
names = torchvision.models.resnet18().state_dict().keys()
assert list(model.state_dict()) == list(names)
