"""What the image examples share: data, an augmentation, networks, and the measures of the features that come out."""

import gzip
import lzma
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import negmine

FASHION_MNIST = Path(__file__).resolve().parent / "data" / "fashion-mnist"


class Images(NamedTuple):
    train: Tensor  # (N, C, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test: Tensor  # (M, C, H, W) uint8
    test_labels: Tensor  # (M,) int64


def load_idx(folder: Path = FASHION_MNIST) -> Images:
    """The four IDX files of MNIST's format in a folder, plain or compressed by gzip or xz."""

    def read(name: str) -> Tensor:
        for ending, unpack in ((".xz", lzma.decompress), (".gz", gzip.decompress), ("", bytes)):
            path = folder / f"{name}-ubyte{ending}"
            if path.exists():
                data = unpack(path.read_bytes())
                shape = np.frombuffer(
                    data, ">i4", count=data[3], offset=4
                )  # the fourth byte is the number of dimensions
                return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())
        raise FileNotFoundError(f"{folder} has no {name}-ubyte, {name}-ubyte.gz or {name}-ubyte.xz")

    train, test = read("train-images-idx3")[:, None], read("t10k-images-idx3")[:, None]
    return Images(train, read("train-labels-idx1").long(), test, read("t10k-labels-idx1").long())


def load_folder(folder: Path, size: int) -> Images:
    """Class folders of pictures, all held in memory as (3, size, size); needs Pillow.

    With folder/train and folder/test (or folder/val), those; else every sixth picture is for testing.
    """
    from PIL import Image

    def read(path: Path) -> Tensor:
        with Image.open(path) as picture:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.convert("RGB").crop((left, top, left + side, top + side)).resize((size, size))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    def stack(found: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([read(path) for path, _ in found]), torch.tensor([label for _, label in found])

    training = folder / "train" if (folder / "train").is_dir() else folder
    testing = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), training)
    classes = sorted(path.name for path in training.iterdir() if path.is_dir())
    found: dict[Path, list[tuple[Path, int]]] = {}
    for root in {training, testing}:
        by_class = [sorted(path for path in (root / name).rglob("*") if path.is_file()) for name in classes]
        found[root] = [(path, label) for label, paths in enumerate(by_class) for path in paths]
    if not found[training]:
        raise FileNotFoundError(f"{training} has no class folders with pictures")
    if testing == training:
        return Images(*stack([x for i, x in enumerate(found[training]) if i % 6]), *stack(found[training][::6]))
    return Images(*stack(found[training]), *stack(found[testing]))


def load_torchvision(name: str, root: str, size: int) -> Images:
    """A set of torchvision.datasets with train=True and train=False, such as CIFAR10, all held in memory."""
    from torchvision import datasets
    from torchvision.transforms.functional import pil_to_tensor

    def stack(train: bool) -> tuple[Tensor, Tensor]:
        pictures, labels = zip(*getattr(datasets, name)(root, train=train), strict=True)
        return torch.stack([pil_to_tensor(p.convert("RGB").resize((size, size))) for p in pictures]), torch.tensor(
            labels
        )

    return Images(*stack(True), *stack(False))


def load(data: str, size: int, root: str) -> Images:
    """fashion-mnist (the subset of the repository), torchvision:NAME, a folder of IDX files, or a folder of class folders."""
    if data == "fashion-mnist":
        return load_idx()
    if data.startswith("torchvision:"):
        return load_torchvision(data.removeprefix("torchvision:"), root, size)
    return load_idx(Path(data)) if any(Path(data).glob("*-idx3-ubyte*")) else load_folder(Path(data), size)


def as_float(images: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> fp32 in [0, 1]."""
    return images.float() / 255


def augment(images: Tensor) -> Tensor:
    """Another view of each image, (B, C, H, W) uint8 -> fp32: a random crop, perhaps flipped, with other contrast and gamma."""
    B, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(B, device=device).uniform_(low, high)

    side = uniform(0.55, 1.0)  # of the crop, as a share of the image's
    stretch = uniform(math.log(0.85), math.log(1.18)).mul(0.5).exp()
    width, height = (side * stretch).clamp_max(1), (side / stretch).clamp_max(1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    matrix = torch.zeros(B, 2, 3, device=device)
    matrix[:, 0, 0], matrix[:, 0, 2] = width * flip, uniform(-1, 1) * (1 - width)
    matrix[:, 1, 1], matrix[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    crop = F.grid_sample(as_float(images), grid, align_corners=False, padding_mode="border")
    if images.shape[1] == 3:  # other colours, and a fifth of the views without any
        tint = torch.empty(B, 3, 1, 1, device=device).uniform_(0.7, 1.3)
        grey = (uniform(0, 1) < 0.2)[:, None, None, None]
        crop = torch.where(grey, crop.mean(1, keepdim=True), (crop * tint).clamp_max(1))
    gamma, contrast = uniform(-0.7, 0.7).exp(), uniform(0.5, 1.3)
    return crop.clamp_min(1e-4).pow(gamma[:, None, None, None]) * contrast[:, None, None, None]


class SmallConvNet(nn.Sequential):
    """(B, C, H, W) -> features (B, 128): five convolutions, for images of about 30 x 30 on a CPU."""

    dim = 128

    def __init__(self, channels: int = 1) -> None:
        layers: list[nn.Module] = []
        for i, o, stride in ((channels, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def encoder_of(arch: str, channels: int) -> tuple[nn.Module, int]:
    """A network without its classifier, and the width of its features: "small", or a name of torchvision.models."""
    if arch == "small":
        return SmallConvNet(channels), SmallConvNet.dim
    from torchvision import models

    network = getattr(models, arch)()
    dim = network.fc.in_features
    network.fc = nn.Identity()
    if channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
    return network, dim


def head(dim: int, out: int = 128, hidden: int = 256) -> nn.Sequential:
    """The projection head, which is dropped after training (SimCLR, MoCo v2)."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """Unit features (N, D) of images as they are, by an encoder in evaluation mode."""
    was_training = encoder.training
    encoder.eval()
    rows = [F.normalize(encoder(as_float(part)).float(), dim=1) for part in images.split(batch)]
    encoder.train(was_training)
    return torch.cat(rows)


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20) -> float:
    """Accuracy of a vote of the k nearest training rows, with weights exp(cosine / 0.1). Rows are unit features."""
    scores, index = negmine.mine_hardest(test, train, k)  # the hardest negatives of a query are its nearest neighbours
    votes = F.one_hot(train_labels[index]) * (scores / 0.1).exp()[:, :, None]  # (M, k, classes)
    return (votes.sum(1).argmax(1) == test_labels).float().mean().item()


@torch.enable_grad()
def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of logistic regression on frozen features, fitted by 100 iterations of L-BFGS."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    linear = nn.Linear(train.shape[1], int(train_labels.max()) + 1).to(train.device)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(train), train_labels) + 1e-4 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (linear(test).argmax(1) == test_labels).float().mean().item()


def alignment_and_uniformity(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Of two views' unit embeddings (N, D): mean |a - b|^2 of pairs, and log mean exp(-2 |a - a'|^2) (Wang and Isola 2020).

    arXiv 2005.10242; lower is better for both.
    """
    alignment = (first - second).square().sum(1).mean()
    return alignment.item(), torch.pdist(first).square().mul(-2).exp().mean().log().item()
