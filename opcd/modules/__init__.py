"""Student, teachers, rollouts, and the LightningModule that joins them."""

from opcd.modules.distiller import Distiller
from opcd.modules.distributed.fsdp_strategy import FSDP2Strategy
from opcd.modules.lm.adapters import Lora
from opcd.modules.lm.cartridge import Cartridge
from opcd.modules.lm.generation import Sampling
from opcd.modules.rollouts.base import Rollout
from opcd.modules.rollouts.colocated_vllm import ColocatedVLLM
from opcd.modules.rollouts.mixed_rollout import MixedRollout
from opcd.modules.rollouts.recorded_rollout import RecordedRollout
from opcd.modules.rollouts.student_rollout import StudentRollout
from opcd.modules.rollouts.teacher_rollout import TeacherRollout
from opcd.modules.rollouts.vllm_rollout import VLLMRollout
from opcd.modules.rollouts.vllm_server import VLLMServer
from opcd.modules.student import Student
from opcd.modules.teachers.base import ModelTeacher, Teacher
from opcd.modules.teachers.model_teachers import BaseTeacher, FrozenTeacher, MovingAverageTeacher, SelfTeacher
from opcd.modules.teachers.recorded_teacher import RecordedTeacher
from opcd.modules.teachers.routed_teachers import RoutedTeachers
from opcd.modules.teachers.served_teacher import ServedTeacher
from opcd.modules.trajectories import Trajectories

__all__ = [
    "BaseTeacher",
    "Cartridge",
    "ColocatedVLLM",
    "Distiller",
    "FSDP2Strategy",
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
