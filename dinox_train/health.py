"""Collapse monitors: five figures that say whether a self-supervised run still learns something.

Pure functions of tensors, computed in float32 or better, that return 0-dim tensors on the tensors' device. Nothing here
waits for the device, with one exception that has its own function: `torch.linalg.eigvalsh` looks at its status on the
host, so on a GPU take `feature_gram` there, copy that small matrix, and call `effective_rank_of_gram` on the copy.

A low loss proves nothing, since a collapsed pair agrees perfectly; a loss pinned at ln K proves a collapse. These
figures tell both from learning. Non-finite input gives a non-finite figure, but for `prototype_use`, which only
compares.
"""

import math

import torch
from torch import Tensor


def teacher_entropy(targets: Tensor) -> Tensor:
    """Mean entropy of the teacher's targets as a share of ln K: 1 says nothing (uniform), 0 is certain (one-hot).

    targets: (n, K) probabilities, each row summing to 1, K >= 2. 0 ln 0 counts as 0.
    """
    _need_matrix(targets, "targets", smallest_columns=2)
    probabilities = targets.float()
    return torch.special.entr(probabilities).sum(dim=1).mean() / math.log(targets.shape[1])


def feature_std(cls: Tensor) -> Tensor:
    """How far apart the samples point: the mean over dimensions of the (population) standard deviation over samples of
    the L2-normalised features, times sqrt(d).

    About 1 when the directions are spread evenly over the sphere, 0 when all samples point the same way; features that
    fill only r of d axes evenly give sqrt(r / d). The quantity of SimSiam's figure 2 (Chen and He, arXiv 2011.10566).

    cls: (n, d) features. One sample has no spread: 0.
    """
    _need_matrix(cls, "cls")
    directions = torch.nn.functional.normalize(cls.float(), dim=1)
    return directions.std(dim=0, correction=0).mean() * math.sqrt(cls.shape[1])


def feature_gram(cls: Tensor) -> Tensor:
    """The smaller Gram matrix (m, m), m = min(n, d), of the centred features, in float64.

    Its eigenvalues are the squared singular values that `effective_rank` is made of. Scaled so that its trace is 1; all
    zero where all samples are equal.

    cls: (n, d) features.
    """
    _need_matrix(cls, "cls")
    # float64, since the Gram matrix squares the condition number; the tensors are small (a batch of class tokens).
    features = cls.double()
    scale = features.abs().amax()
    centred = features / torch.where(scale > 0, scale, torch.ones_like(scale))
    centred = centred - centred.mean(dim=0)
    # Equal samples differ from their computed mean by rounding. In float32 input nothing below its own resolution is a
    # direction, so such a remainder must not be scaled up to look like one.
    spread = centred.abs().amax()
    centred = torch.where(spread > 1e-9, centred, centred * 0)
    gram = centred @ centred.T if cls.shape[0] <= cls.shape[1] else centred.T @ centred
    trace = gram.diagonal().sum()
    return gram / torch.where(trace > 0, trace, torch.ones_like(trace))


def effective_rank_of_gram(gram: Tensor) -> Tensor:
    """Effective rank of the features whose `feature_gram` this is; 1 for a zero matrix, NaN for a non-finite one."""
    finite = torch.isfinite(gram).all()
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, gram, torch.zeros_like(gram)))
    # The trace is 1, so what lies below float64's resolution times the size is rounding, negative values included.
    floor = gram.shape[0] * torch.finfo(gram.dtype).eps
    singular = torch.where(eigenvalues > floor, eigenvalues, torch.zeros_like(eigenvalues)).sqrt()
    total = singular.sum()
    shares = singular / torch.where(total > 0, total, torch.ones_like(total))
    rank = torch.special.entr(shares).sum().exp()
    return torch.where(finite, rank, torch.full_like(rank, math.nan)).float()


def effective_rank(cls: Tensor) -> Tensor:
    """Effective rank of the centred features: exp of the entropy of the singular values' shares (Roy and Vetterli,
    EUSIPCO 2007). Between 1 (all samples on a line, or all equal) and min(n - 1, d): a small batch bounds it.

    cls: (n, d) features. On a GPU this waits for the device; see the file's docstring.
    """
    return effective_rank_of_gram(feature_gram(cls))


def prototype_use(targets: Tensor) -> Tensor:
    """The fraction of the K prototypes that are some sample's most likely one; at most n / K.

    targets: (n, K) probabilities or logits.
    """
    return used_prototypes(targets).float().mean()


def used_prototypes(targets: Tensor) -> Tensor:
    """bool (K,): which prototypes are some sample's most likely one.

    targets: (n, K) probabilities or logits.
    """
    _need_matrix(targets, "targets")
    used = torch.zeros(targets.shape[1], dtype=torch.bool, device=targets.device)
    # scatter_ of a constant needs no count of distinct values, which would have to be known on the host.
    return used.scatter_(0, targets.argmax(dim=1), True)


def patch_similarity(patches: Tensor) -> Tensor:
    """How alike the patches of an image are: the mean cosine of all pairs of different ones, mean over images.

    1 where all patches of an image have the same features, a dense collapse; about 0 where they point anywhere. Of n
    directions with the sum s it is (|s|^2 - n) / (n (n - 1)), so that no pair has to be looked at. A zero feature has
    the cosine 0 with all others.

    patches: (b, n, d) features, n >= 2.
    """
    if patches.ndim != 3 or patches.shape[0] < 1 or patches.shape[1] < 2:
        raise ValueError(f"patches: found shape {tuple(patches.shape)}, needed (b, n, d), b >= 1, n >= 2")
    n = patches.shape[1]
    directions = torch.nn.functional.normalize(patches.float(), dim=2)
    pairs = directions.sum(dim=1).square().sum(dim=1) - directions.square().sum(dim=(1, 2))
    return (pairs / (n * (n - 1))).mean()


def _need_matrix(tensor: Tensor, name: str, smallest_columns: int = 1) -> None:
    if tensor.ndim != 2 or tensor.shape[0] < 1 or tensor.shape[1] < smallest_columns:
        raise ValueError(
            f"{name}: found shape {tuple(tensor.shape)}, needed (n, columns), n >= 1, columns >= {smallest_columns}"
        )
