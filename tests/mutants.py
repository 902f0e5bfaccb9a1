"""Whether the tests notice mistakes: python -m tests.mutants (make mutants) makes some fifty, one at a time, in a copy
of the checkout, and runs the quick tests that ought to fail.

A mistake is one that a person could make, in a single line, and changes what is computed. What survives is listed at
the end, and the exit code is then 1: a test is missing, or the program is the same (then say why: `equivalent`).
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT = 240.0  # seconds for the tests of one mutation; what hangs is noticed
BASELINE_TIMEOUT = 3600.0


class Mutation(NamedTuple):
    """One mistake, and who should notice."""

    file: str
    """Below syncbn/."""
    old: str
    """What stands there, exactly once."""
    new: str
    tests: str
    """Below tests/, files or names of tests, with spaces between them."""
    equivalent: str = ""
    """Why no test can notice."""


M = Mutation
MUTATIONS = [
    # nn
    M("nn/functional.py", "if pool is not None or is_second:", "if pool is not None:",
      "nn/test_checkpointing.py::test_momentum_none_the_bare_function_and_sequential_checkpoints"),
    M("nn/functional.py", 'sums = reduce(sums, ctx.group, ctx.owner, "backward")', "pass",
      "nn/test_batchnorm_ranks.py::test_uneven_and_empty_shards_equal_the_concatenated_batch"),
    M("nn/functional.py", "kept = output if activations.output_tells(activation) else residual", "kept = output",
      "nn/test_activations.py::test_as_outside_of_it"),
    M("nn/batchnorm.py", "if self._stats_frozen:\n            if",
      "if self._stats_frozen and not self.training:\n            if", "nn/test_batchnorm.py"),
    M("nn/batchnorm.py", '_OF_A_CONTEXT = ("_pool", "_record", "_stats_disabled")',
      '_OF_A_CONTEXT = ("_pool", "_stats_disabled")',
      "stats/test_monitor.py::test_an_exception_a_copy_and_a_second_monitor"),
    M("nn/moments.py", "torch.zeros_like(mean), count * var", "torch.zeros_like(mean), (count - 1) * var",
      "nn/test_groups.py::test_pooling_weights_by_samples_and_keeps_the_spread_of_the_means"),
    M("nn/collectives.py", "return _AllReduceSum.apply(grad, ctx.sum_in_place), None", "return grad, None",
      "nn/test_autograd.py::test_double_backward_includes_the_other_ranks"),
    M("nn/groups.py", "dist.new_group(timeout=timeout_of(dist.group.WORLD))", "dist.new_group()",
      "nn/test_groups.py::test_a_group_of_all_ranks_for_batch_normalization_alone"),
    M("nn/frozen.py", "remembered.get(id(p), p.requires_grad)", "p.requires_grad", "surgery/test_freeze.py"),
    M("nn/stale_ddp.py", "elif before != frozen_names:", "elif len(before) != len(frozen_names):",
      "nn/test_stale_ddp.py::test_a_swap_of_as_many_parameters_is_noticed"),
    M("nn/checkpointing.py", "fresh = [memory for memory in alive if memory.used_in != self.backward_pass]",
      "fresh = alive",
      "nn/test_checkpointing.py::test_two_calls_of_one_layer_in_one_checkpoint_are_told_apart"),
    M("nn/checkpointing.py", "for other in dropped:", "for other in ():",
      "nn/test_checkpointing.py::test_losses_that_are_summed_up_undetached_do_not_keep_all_moments"),
    M("nn/recorder.py", "return count / invstd.square()", "return (count - 1.0) / invstd.square()",
      "stats/test_monitor.py::test_variance_between_ranks_is_told_from_variance_within"),
    M("nn/even_steps.py", "next((one.packed for one in offers if one.packed is not None), None)", "offers[0].packed",
      "nn/test_even_steps.py"),
    M("nn/lean.py", "_MAX_CONDITION = 4.0", "_MAX_CONDITION = 40.0", "nn/test_lean.py"),
    M("nn/subclasses.py", "return id(running_mean) in self.tensors", "return True", "nn/test_subclasses.py"),
    M("nn/subclasses.py", 'self._buffers["num_batches_tracked"] = counter.clone()',
      'self._buffers["num_batches_tracked"] = counter', "nn/test_subclasses.py"),
    M("nn/conversion.py", 'process_group if process_group is not None else getattr(layer, "process_group", None)',
      "process_group", "surgery/test_convert.py"),
    # kernels
    M("kernels/reference.py", "torch.where(count > 1,", "torch.where(count > 0,",
      "nn/test_batchnorm_ranks.py::test_one_value_per_channel_in_the_world_gives_the_bias_and_keeps_the_variance"),
    M("kernels/reference.py", "projected = xhat * per_channel(-projection, input)",
      "projected = xhat * per_channel(projection, input)",
      "nn/test_batchnorm.py::test_a_gradient_that_can_be_differentiated_again_is_the_same_gradient"),
    M("kernels/packing.py", "_split(square_pair, 2 * exponent)", "_split(square_pair, exponent)",
      "nn/test_moments.py nn/test_numbers.py"),
    M("kernels/packing.py", "low = (((total[0] - product[0]) - product[1]) + total[1]) / n",
      "low = torch.zeros_like(high)", "nn/test_moments.py nn/test_numbers.py"),
    M("kernels/cpu.py", "if not fits or float(count) * num_channels != input.numel() or _is_far(mean, invstd):",
      "if not fits or _is_far(mean, invstd):", "nn/test_masks.py"),
    M("kernels/cpu_statistics.py", "if count > 1.0:", "if count > 2.0:",
      "kernels/test_cpu.py::test_running_statistics_of_any_type_move_alike"),
    M("kernels/cpu_blocks.py", "sums += torch.stack(native_sums(grad_rows[whole:], rows[whole:], mean))", "pass",
      "kernels/test_cpu.py::test_any_shape_and_layout"),
    M("kernels/triton/reductions.py", "unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))",
      "unbiased = variance", "kernels/test_cuda.py::test_running_statistics_move_as_in_the_reference"),
    M("kernels/triton/elementwise.py", "tl.fma((x - high) - low, slope, g - grad_mean)",
      "tl.fma(x - high, slope, g - grad_mean)",
      "kernels/test_cuda.py::test_the_gradient_where_it_follows_an_input_far_from_zero"),
    M("kernels/triton/launch_plan.py", "* (layout.size + width) >= 2**31", "* (layout.size + width) >= 2**32",
      "kernels/test_cuda.py::test_plans_cover_every_value_once"),
    M("kernels/triton/double_double.py", "tl.where(field == 0, 0, field - 1022)",
      "tl.where(field == 0, 0, field - 1023)",
      "kernels/test_cuda.py::test_payloads_are_cut_at_the_same_place_as_the_reference_cuts_them"),
    # surgery
    M("surgery/freeze.py", "freeze_parameters(parameters[True], root)", "freeze_parameters(parameters[True])",
      "surgery/test_freeze.py"),
    M("surgery/freeze_plan.py", "step < self.until)", "step <= self.until)", "surgery/test_freeze.py"),
    M("surgery/convert.py", "match=match, exclude=exclude, skip", "match=match, skip", "surgery/test_convert.py"),
    M("surgery/revert.py", "if layer.stats_frozen and layer.training:", "if layer.stats_frozen:",
      "surgery/test_convert.py"),
    M("surgery/revert.py", "unfreeze_parameters([layer], module)", "pass", "surgery/test_convert.py"),
    M("surgery/fuse.py", "if num_uses > 1:", "if num_uses > 2:", "surgery/test_fuse.py"),
    M("surgery/fusion_sites.py", "if len(addition.users) != 1:", "if not addition.users:", "surgery/test_fuse.py"),
    M("surgery/fusion_sites.py", "if residual in taken:", "if False:", "surgery/test_fuse.py"),
    # training
    M("training/checkpoint/state.py", 'value.detach().to("cpu", copy=True)', 'value.detach().to("cpu")',
      "training/checkpoint/test_state.py"),
    M("training/checkpoint/files.py", "with replacing(path, durable=True) as temporary:",
      "with replacing(path) as temporary:", "training/checkpoint/test_state.py"),
    M("training/checkpoint/frozen.py", "targets[name] ^ frozen_switches(module)",
      "targets[name] - frozen_switches(module)", "training/checkpoint/test_state.py"),
    M("training/checkpoint/resume.py", 'MAY_CHANGE = ("task", ', 'MAY_CHANGE = ("seed", "task", ',
      "training/checkpoint/test_resume.py::test_what_may_not_change_is_named"),
    M("training/optim/update.py", "norm = norm / self.scaler.scale(self._one)", "pass",
      "training/trainer/test_execution.py::test_a_gradient_is_scaled_down_to_the_norm_and_a_shorter_one_left_alone"),
    M("training/optim/schedules.py", "rising = (step + 1) / (warmup + 1)", "rising = step / (warmup + 1)",
      "training/tracking/test_tracker.py::test_warmup_is_linear_and_the_cosine_ends_at_its_final_share"),
    M("training/data/sampler.py", "mix_key(seed, epoch, Draw.SHUFFLE)", "mix_key(seed, Draw.SHUFFLE)",
      "training/data/test_data.py"),
    M("training/data/augment.py", "Draw.SHIFT_X)[:, None]", "Draw.SHIFT_Y)[:, None]", "training/data/test_data.py"),
    M("training/data/randomness.py", "key = _mix_int(key ^ (part & _MASK))", "key ^= _mix_int(part & _MASK)",
      "training/data/test_data.py"),
    M("training/data/loader.py", "if self._training is None or self._training[0] != step:",
      "if self._training is None:",
      "training/data/test_loader.py::test_a_jump_to_another_step_gives_the_batches_of_that_step"),
    M("training/data/images.py", "flip, seed, epoch, fill=IGNORE)", "flip, seed, epoch)",
      "training/data/test_folders.py::test_image_and_mask_are_cut_alike_and_move_together"),
    M("training/data/images.py", "/ max(1, count - 1)", "/ count",
      "training/data/test_folders.py::test_the_statistics_are_those_of_the_training_pixels"),
    M("training/trainer/trainer.py", "seed_generators(mix_key(self.config.seed, step, self.context.rank, Draw.MODEL), "
      "self.context.device)", "pass",
      "training/checkpoint/test_resume.py::test_what_a_model_draws_after_a_resume_is_what_it_would_have_drawn"),
    M("training/trainer/trainer.py", "mix_key(self.config.seed, step, self.context.rank, Draw.MODEL)",
      "mix_key(self.config.seed, step, Draw.MODEL)",
      "training/trainer/test_train.py::test_a_model_draws_other_numbers_in_every_step_and_on_every_rank"),
    M("training/trainer/trainer.py", "loss_sum * (self.context.world_size / nominal)", "loss_sum * (1.0 / nominal)",
      "training/checkpoint/test_resume.py::test_another_world_size_goes_on_along_the_same_trajectory"),
    M("training/trainer/trainer.py", "torch.where(totals[1] > 0, nominal / totals[1], 1.0)",
      "torch.ones_like(totals[1])",
      "training/test_own_package.py::test_a_function_is_a_loss_too_and_its_counts_may_be_weights_that_add_up_to_less_than_one"),
    M("training/trainer/trainer.py", "torch.where(outcome.left_out, 0.0, kept)", "kept",
      "training/trainer/test_faults.py::test_skip_leaves_the_step_out_bit_for_bit_and_goes_on"),
    M("training/evaluation/evaluate.py", "with evaluating(model), torch.no_grad():", "with torch.no_grad():",
      "training/evaluation/test_metrics.py::test_the_mean_over_all_samples_at_any_world_size"),
    M("training/evaluation/metrics.py", 'best == LOSS or (', "(",
      "training/evaluation/test_metrics.py::test_the_best_is_the_lowest_of_a_metric_that_is_an_error"),
    M("training/distributed/ddp.py", "_WARM_UP_PASSES = 2", "_WARM_UP_PASSES = 0",
      "training/checkpoint/test_resume.py::test_two_interruptions_are_bit_exact_with_everything_on"),
    M("training/distributed/ddp.py", "buffer.copy_(value)", "pass",
      "training/checkpoint/test_resume.py::test_another_world_size_goes_on_along_the_same_trajectory"),
    # the files beside the folders
    M("atomic_write.py", "_flush(temporary)", "pass", "test_atomic_write.py"),
]  # fmt: skip


def label(mutation: Mutation) -> str:
    """A line that says what is changed into what."""
    return f"{mutation.file}: {mutation.old}  ->  {mutation.new}"


def copy_checkout(target: Path) -> None:
    """What git tracks, and what it does not but would not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(copy: Path, tests: list[str], timeout: float) -> tuple[int | None, str]:
    """pytest's exit code (None: it took too long) and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    options = ["-x", "-q", "-m", "not slow and not root", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in tests)],
        cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks too
        process.communicate()
        return None, ""
    return process.returncode, output


def verdict_on(copy: Path, mutation: Mutation) -> tuple[str, str]:
    """ "noticed", "timed out" or "SURVIVED"; and which test says so.

    Raises:
        SystemExit: its snippet is not there once, or its tests cannot be run.
    """
    path = copy / "syncbn" / mutation.file
    text, times = path.read_text(encoding="utf-8"), path.stat()
    if text.count(mutation.old) != 1:
        raise SystemExit(f"error: occurs {text.count(mutation.old)} times: {label(mutation)}")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, output = run_tests(copy, mutation.tests.split(), TIMEOUT)
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # by which Python knows its bytecode
    if code is not None and code > 1:
        raise SystemExit(f"error: pytest ended with {code}: {label(mutation)}\n{output}")
    failed = next((line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))), "")
    is_silent = code is None or re.search(r"^E .*did not answer within", output, re.MULTILINE)
    if is_silent:  # ranks that wait for each other, or a busy machine
        return "timed out", failed
    return ("noticed" if code else "SURVIVED"), failed


def print_table(verdicts: dict[Mutation, str]) -> None:
    """By folder: how many, and the share that was noticed."""
    folders = {mutation: str(Path(mutation.file).parent) for mutation in verdicts}
    made = Counter(folders.values())
    noticed = Counter(folders[mutation] for mutation, verdict in verdicts.items() if verdict != "SURVIVED")
    print(f"\n{'folder':<24}{'made':>6}{'noticed':>9}{'share':>7}")
    for folder in [*made, "all"]:
        number, seen = (len(verdicts), noticed.total()) if folder == "all" else (made[folder], noticed[folder])
        print(f"{folder:<24}{number:>6}{seen:>9}{seen / number:>7.0%}")


def main() -> int:
    """The exit code: 1 where something survived that could have been noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of the line that a mutation is printed as")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--unchecked", action="store_true", help="do not see first that the tests pass as it is")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in label(mutation)]
    if options.list or not chosen:
        print("\n".join(map(label, chosen)) or f"error: --only {options.only}: no such mutation")
        return int(not chosen)
    start = time.monotonic()
    verdicts: dict[Mutation, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copy = Path(directory)
        copy_checkout(copy)
        if not options.unchecked:
            every = dict.fromkeys(name for mutation in chosen for name in mutation.tests.split())
            code, output = run_tests(copy, list(every), BASELINE_TIMEOUT)
            if code != 0:
                raise SystemExit(f"error: the tests do not pass without a mutation\n{output}")
            print(f"without a mutation all tests pass ({time.monotonic() - start:.0f} s)", flush=True)
        for mutation in chosen:
            began = time.monotonic()
            verdicts[mutation], failed = verdict_on(copy, mutation)
            print(f"{verdicts[mutation]:<10}{time.monotonic() - began:>4.0f} s  {label(mutation)}", flush=True)
            if failed:
                print(f"{'':<18}{failed[:160]}", flush=True)
    print_table(verdicts)
    survivors = [mutation for mutation, verdict in verdicts.items() if verdict == "SURVIVED"]
    for mutation in survivors:
        print(f"survived: {label(mutation)}{mutation.equivalent and f'  (equivalent: {mutation.equivalent})'}")
    print(f"{time.monotonic() - start:.0f} s")
    return int(any(not mutation.equivalent for mutation in survivors))


if __name__ == "__main__":
    sys.exit(main())
