"""A torchvision network in fused steps: `python examples/fuse_torchvision.py` trains and evaluates one."""

import torch
import torchvision

import fastres

torch.manual_seed(0)
plain = torchvision.models.resnet50(num_classes=10)
model = fastres.fuse(plain)  # a copy that shares parameters and buffers
print(fastres.fuse_report(model))

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
images, labels = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
for _ in range(2):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

with torch.no_grad():
    expected, actual = plain.eval()(images), model.eval()(images)
print(f"largest difference from torchvision's forward: {(actual - expected).abs().max():.1e}")
torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
