"""Rollouts of several turns: every move of every game is a response of its own."""

from typing import ClassVar

from opcd.data import Batch, ContextQueryDataModule
from opcd.games.game_lengths import history_tokens
from opcd.games.game_seeds import as_game
from opcd.games.play import Game, play
from opcd.modules.rollouts.plain_rollouts import Rollout, StudentRollout
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories


class GameRollout(Rollout):
    """Plays the games of a batch to their ends, all at once, and gives a row for every move.

    A row has both views of its turn: the prompt with all that was said so far, and, for the teacher, the same with the
    context of its game. The player is another rollout: StudentRollout is on-policy (the student, without the context),
    TeacherRollout off-policy, MixedRollout draws who makes each move.

    Args:
        rollout: who writes the reply of a turn; StudentRollout if null.
    """

    several_turns: ClassVar[bool] = True

    def __init__(self, rollout: Rollout | None = None) -> None:
        self.rollout = rollout or StudentRollout()
        if self.rollout.several_turns:
            raise ValueError("GameRollout wants a rollout that writes one reply, not another GameRollout")
        self.max_importance = self.rollout.max_importance

    @property
    def parts(self) -> list[Rollout]:
        """Those that make the moves."""
        return self.rollout.parts

    def longest_response(self, data: ContextQueryDataModule, split: str) -> int:
        """A reply, after the moves that came before it."""
        games = [as_game(example) for example in data.examples(split)]
        added = history_tokens(games, lambda example: len(data.views.student_prompt(example)))
        return added + self.rollout.longest_response(data, split)

    def synchronise(self, student: Student) -> None:
        """Once for all turns."""
        self.rollout.synchronise(student)

    def release(self) -> None:
        """After the last turn."""
        self.rollout.release()

    def sample(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Play. Rows come turn by turn, and within a turn in the order of the batch."""
        games = [Game(as_game(example)) for example in batch.examples]
        turns: list[Trajectories] = []

        def respond(running: list[Game]) -> list[str]:
            """The next move of each game, kept as a row for both views."""
            rows = [number for number, game in enumerate(games) if game.success is None]
            turn = batch.select(rows).asking([game.question for game in running])
            written = self.rollout.sample(student, teacher, turn)
            turns.append(written)
            return [str(student.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written.responses]

        play(games, respond)
        return Trajectories.joined(turns)
