"""A checkpoint, whoever wrote it, into networks that are shared out over ranks: each reads its rows by itself."""

from __future__ import annotations

import torch

from dinox_train.checkpoint import Checkpoint, restore_optimizer
from dinox_train.network import Networks
from dinox_train.part import values_of
from dinox_train.sharded_checkpoint import read_file_into, read_into, shapes
from dinox_train.sharded_weights import ShardedWeights


def restore_shards(networks: Networks, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Be what the checkpoint holds: student, teacher, Gram teacher, optimizer. No rank waits for another.

    Raises DamagedCheckpoint, and CheckpointError where it is of other networks.
    """
    student, teacher, folder = networks.student_weights, networks.teacher_weights, checkpoint.folder
    assert isinstance(student, ShardedWeights)
    assert isinstance(teacher, ShardedWeights)
    read_into(folder, "student", student.state_dict())
    of_teacher = teacher.state_dict()
    backbone = {name.removeprefix("backbone."): one for name, one in of_teacher.items() if name.startswith("backbone.")}
    read_file_into(folder, "model.safetensors", backbone)
    read_into(folder, "teacher_heads", {name: one for name, one in of_teacher.items() if name.startswith("heads.")})
    moments = student.empty_moments(shapes(folder, "optimizer"))
    read_into(folder, "optimizer", moments)
    restore_optimizer(optimizer, student.named, values_of(moments))
    if checkpoint.has("gram_teacher"):
        read_into(folder, "gram_teacher", networks.gram_weights.state_dict())
