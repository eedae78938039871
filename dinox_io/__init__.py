"""From DICOM files to batches of int16 Hounsfield units: packing, shards, windows, the loader. No torch."""

from dinox_io.batch import Batch as Batch
from dinox_io.errors import LoaderError as LoaderError
from dinox_io.errors import LoaderStalled as LoaderStalled
from dinox_io.errors import ShardError as ShardError
from dinox_io.loader import Loader as Loader
from dinox_io.shardset import ShardSet as ShardSet
from dinox_io.shardset import VolumeRecord as VolumeRecord
from dinox_io.shardset import open_shards as open_shards
from dinox_io.verify import Damage as Damage
from dinox_io.verify import verify_set as verify_set
