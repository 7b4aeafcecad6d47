"""Multi-turn rollouts: every move of every game is a separate response."""

from contextlib import AbstractContextManager
from typing import ClassVar

from opcd.data import Batch, ContextQueryDataModule
from opcd.games.game_seeds import as_game
from opcd.games.play import Game, history_tokens, play
from opcd.modules.rollouts.base import Rollout
from opcd.modules.rollouts.student_rollout import StudentRollout
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories


class GameRollout(Rollout):
    """Plays the games of a batch to their ends, side by side, and returns a row for every move.

    A row has both views of its turn: the prompt with the game so far, and for the teacher the same with the context.
    Another rollout plays: StudentRollout is on-policy (the student, without the context), TeacherRollout off-policy,
    MixedRollout draws the player of each move.

    Args:
        rollout: writes the reply of each turn; StudentRollout if null.
    """

    multi_turn: ClassVar[bool] = True

    def __init__(self, rollout: Rollout | None = None) -> None:
        self.rollout = rollout or StudentRollout()
        if self.rollout.multi_turn:
            raise ValueError("GameRollout needs a rollout that writes one reply, not another GameRollout")
        self.importance_clip = self.rollout.importance_clip

    @property
    def parts(self) -> list[Rollout]:
        """The rollouts that make the moves."""
        return self.rollout.parts

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """The longest reply, plus the earlier moves of its game."""
        games = [as_game(example) for example in data.examples(split)]
        added = history_tokens(games, lambda example: len(data.views.student_prompt(example)))
        return added + self.rollout.max_response_tokens(data, split)

    def active(self, student: Student) -> AbstractContextManager[None]:
        """The player's context, once for all turns."""
        return self.rollout.active(student)

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Play the games. Rows are ordered by turn, and within a turn as in the batch."""
        games = [Game(as_game(example)) for example in batch.examples]
        turns: list[Trajectories] = []

        def respond(running: list[Game]) -> list[str]:
            """The next reply in each game; its row is kept."""
            rows = [number for number, game in enumerate(games) if game.success is None]
            turn = batch.select(rows).asking([game.question for game in running])
            written = self.rollout.generate(student, teacher, turn)
            turns.append(written)
            return [str(student.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written.responses]

        play(games, respond)
        return Trajectories.joined(turns)
