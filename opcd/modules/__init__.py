"""Student, teachers, rollouts, and the LightningModule that joins them."""

from opcd.modules.adapters import Lora
from opcd.modules.distiller import Distiller
from opcd.modules.generation import Sampling
from opcd.modules.recorded_teacher import RecordedTeacher
from opcd.modules.rollouts import MixedRollout, RecordedRollout, Rollout, StudentRollout, TeacherRollout
from opcd.modules.routed_teachers import RoutedTeachers
from opcd.modules.served_teacher import ServedTeacher
from opcd.modules.student import Student
from opcd.modules.teacher import ModelTeacher, Teacher
from opcd.modules.teachers import BaseTeacher, FrozenTeacher, MovingAverageTeacher, SelfTeacher
from opcd.modules.trajectories import Trajectories
from opcd.modules.vllm_engine import ColocatedVLLM
from opcd.modules.vllm_rollout import VLLMRollout
from opcd.modules.vllm_server import VLLMServer

__all__ = [
    "BaseTeacher",
    "ColocatedVLLM",
    "Distiller",
    "FrozenTeacher",
    "Lora",
    "MixedRollout",
    "ModelTeacher",
    "MovingAverageTeacher",
    "RecordedRollout",
    "RecordedTeacher",
    "Rollout",
    "RoutedTeachers",
    "Sampling",
    "SelfTeacher",
    "ServedTeacher",
    "Student",
    "StudentRollout",
    "Teacher",
    "TeacherRollout",
    "Trajectories",
    "VLLMRollout",
    "VLLMServer",
]
