// Loads a network without Python: a .pt2 package that AOTInductor made of a frozen network, see
// docs/serving.md. Prints the class of an image of random pixels.
//
//   serve resnet18.pt2
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ATen.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: serve PACKAGE.pt2\n";
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader network(argv[1]);
  at::manual_seed(0);
  const at::Tensor images = at::randn({1, 3, 32, 32});
  const at::Tensor logits = network.run({images}).at(0);
  std::cout << "class " << logits.argmax(1).item<int64_t>() << "\n";
  return 0;
}
