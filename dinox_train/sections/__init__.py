"""The sections of a run's configuration: each key, its default, and what it means.

Invariant: a section is immutable, strict about types, and closed to unknown keys.
"""

from dinox_train.sections.data import DataSection as DataSection
from dinox_train.sections.data import WeightedShards as WeightedShards
from dinox_train.sections.execution import ExecutionSection as ExecutionSection
from dinox_train.sections.kernels import KernelsSection as KernelsSection
from dinox_train.sections.model import ModelSection as ModelSection
from dinox_train.sections.objective import ClassificationSection as ClassificationSection
from dinox_train.sections.objective import DINOSection as DINOSection
from dinox_train.sections.objective import GramSection as GramSection
from dinox_train.sections.objective import IBOTSection as IBOTSection
from dinox_train.sections.objective import KoLeoSection as KoLeoSection
from dinox_train.sections.objective import MAESection as MAESection
from dinox_train.sections.objective import ObjectiveSection as ObjectiveSection
from dinox_train.sections.optimizer import OptimizerSection as OptimizerSection
from dinox_train.sections.optimizer import ScheduleSection as ScheduleSection
from dinox_train.sections.optimizer import TeacherSection as TeacherSection
from dinox_train.sections.parallel import ParallelSection as ParallelSection
from dinox_train.sections.plan import PlanSection as PlanSection
from dinox_train.sections.profile import ProfileSection as ProfileSection
from dinox_train.sections.rehearsal import RehearsalSection as RehearsalSection
from dinox_train.sections.run import CheckpointSection as CheckpointSection
from dinox_train.sections.run import EvaluateSection as EvaluateSection
from dinox_train.sections.run import HealthSection as HealthSection
from dinox_train.sections.run import LogSection as LogSection
from dinox_train.sections.run import RunSection as RunSection
from dinox_train.sections.run import StageSection as StageSection
from dinox_train.sections.run import TrainSection as TrainSection
from dinox_train.sections.section import Section as Section
from dinox_train.sections.views import ViewsSection as ViewsSection
from dinox_train.sections.watch import EventsSection as EventsSection
from dinox_train.sections.watch import WatchSection as WatchSection
