"""What a run says of how far it has come."""

from types import SimpleNamespace

from opcd.callbacks import progress

METRICS = {"train/divergence": 0.5, "train/tokens_per_s": 40, "train/response_tokens": 12, "train/ended": 0.75}


def test_the_time_to_go_is_known_from_the_second_step_on_and_leaves_the_first_out(monkeypatch, capsys):
    clock = iter([100.0, 110.0, 120.0, 130.0])  # the first step has taken 100 s, the others take 10
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    bar = progress.StepProgress(every_n_steps=2)
    trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=10, progress_bar_metrics=METRICS)
    bar.on_train_start(trainer, None)
    for step in range(1, 5):
        trainer.global_step = step
        bar.on_train_batch_end(trainer, None)
    told = capsys.readouterr().out.splitlines()
    shown = "0.5000 nats/token  40 tokens/s  12 tokens a response, 75% ended"
    assert told == [
        f"step 1/10  {shown}  ? to go",
        f"step 2/10  {shown}  1:20 to go",
        f"step 4/10  {shown}  1:00 to go",
    ]
