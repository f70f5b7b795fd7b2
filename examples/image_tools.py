"""What the image examples share: the data, an augmentation, a small network, and the accuracy of nearest neighbours."""

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
