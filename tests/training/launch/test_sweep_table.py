"""The table of a multirun: what differs between jobs, and mean and spread over those that repeat one experiment."""

from syncbn.training.launch.sweep_table import rows_of


def job(number, overrides, accuracy, failed=""):
    metrics = {} if failed else {"test/accuracy": accuracy, "test/loss": 1.0, "test/recall/0": 0.5, "train/loss": 2.0}
    return str(number), {"metrics": metrics, "overrides": ["data=table", *overrides], "failed": failed}


def test_folds_have_a_mean_and_a_spread():
    header, rows = rows_of([job(fold, [f"data.fold={fold}"], 0.5 + 0.1 * fold) for fold in range(3)])
    assert header == ("job", "overrides", "test/accuracy")
    assert rows == [("0", "data.fold=0", "0.5"), ("1", "data.fold=1", "0.6"), ("2", "data.fold=2", "0.7"),
                    ("mean", "", "0.6"), ("spread", "", "0.1")]  # fmt: skip


def test_what_else_differs_has_a_mean_of_its_own():
    jobs = [job(2 * lr + seed, [f"optimizer.lr={lr}", f"+seed={seed}"], lr + seed) for lr in (1, 2) for seed in (0, 1)]
    assert rows_of(jobs)[1][4:] == [
        ("mean", "optimizer.lr=1", "1.5"), ("spread", "optimizer.lr=1", "0.7071"),
        ("mean", "optimizer.lr=2", "2.5"), ("spread", "optimizer.lr=2", "0.7071"),
    ]  # fmt: skip


def test_a_sweep_over_something_else_has_none():
    assert len(rows_of([job(lr, [f"optimizer.lr={lr}"], 0.5) for lr in (1, 2)])[1]) == 2


def test_a_fold_that_failed_is_not_in_the_mean_which_says_so():
    jobs = [job(fold, [f"data.fold={fold}"], 0.5, "no disk" if fold == 1 else "") for fold in range(3)]
    header, rows = rows_of(jobs)
    assert header[-1] == "failed"
    assert rows[1] == ("1", "data.fold=1", "", "no disk")
    assert rows[3:] == [("mean", "", "0.5", "2 of 3 jobs"), ("spread", "", "0", "2 of 3 jobs")]
    assert len(rows_of([jobs[0], jobs[1]])[1]) == 2  # of one there is no spread
