"""Names that other trainers have for keys of ours, so that an error says what to write here."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

_RANKS = "torchrun --nproc-per-node {} train.py (or make train NPROC={})"

# Names, without underscores and dashes, and what stands for them here; {} is the value that was given.
_OTHERS = {
    "epochs numepochs nepochs maxepochs nbepochs epoch totalepochs": "duration={}ep",
    "steps maxsteps numsteps iterations iters maxiters maxiter numiters totalsteps trainsteps": "duration={}",
    "bs batch trainbatchsize batchsizepergpu perdevicetrainbatchsize": "batch_size={}, samples over all ranks",
    "learningrate baselr initlr lrate": "optimizer.lr={}",
    "wd decay": "optimizer.weight_decay={}",
    "opt optim": "optimizer={}",
    "scheduler lrscheduler sched lrschedule": "schedule={}",
    "warmupepochs": "schedule.warmup={}ep",
    "warmupsteps warmupiters": "schedule.warmup={}",
    "numworkers nworkers nw dataloadernumworkers": "data.workers={}",
    "dataset dataname": "data={}",
    "datadir dataroot datasetpath datapath root traindir": "data.path={}",
    "imgsize imagesize imgsz inputsize resolution": "data.size={}",
    "arch architecture net network modelname": "model={}",
    "gpus gpu numgpus ngpus devices ndevices nproc nprocpernode numprocesses worldsize ranks numranks": _RANKS,
    "checkpoint ckpt ckptpath checkpointpath": "load={} (task=eval, predict, ...), resume={} or init.model.path={}",
    "weights pretrainedweights pretrainedpath": "init.model.path={}",
    "pretrained": "init.model.path=FILE, or model=timm model.pretrained=true",
    "resumefrom resumefromcheckpoint resumepath": "resume={}",
    "name runname expname experimentname runid": "run={}",
    "output out outdir outputdirectory logdir savedir workdir workspace savepath": "output_dir={}",
    "wandb logger logging": "tracker=wandb or tracker=none",
    "amp half mixedprecision fp16 bf16 autocast dtype": "precision=bf16 or precision=fp16",
    "gradclip clipgrad clipgradnorm maxgradnorm gradientclip gradientclipval gradclipnorm": "clip_norm={}",
    "gradaccum gradientaccumulationsteps gradaccumsteps accumulategradbatches accumiter": "accumulate={}",
    "patience earlystopping earlystoppingpatience": "early_stop={}ep",
    "randomseed manualseed": "seed={}",
    "evalonly evaluate test testonly validate": "task=eval load=outputs/RUN",
    "evalinterval valevery valinterval evalfreq evalsteps checkvaleverynepoch": "eval_every={}ep",
    "savefreq saveinterval saveevery savesteps": "save.every={}",
    "loginterval printfreq logfreq loggingsteps logsteps": "log_every={}",
    "syncbn syncbatchnorm syncbatchnormalization": "bn.sync={}",
    "emadecay modelema useema": "ema=0.999",
    "augmentation augmentations transform transforms augment": "data.augment.NAME._target_=...",
    "cuda nocuda usecuda cpu": "device=cuda or device=cpu",
    "config cfg": "experiment=..., or --config-dir of your own",
    "verbose": "hydra.verbose=true",
}
_HERE = {name: words for names, words in _OTHERS.items() for name in names.split()}
GROUPS = ("data", "model", "loss", "metrics", "optimizer", "schedule", "freeze", "tracker", "experiment", "debug")
OPEN = ("data", "model", "loss", "optimizer")  # those with a choice `custom`


def here(name: str, value: str | None = None) -> str | None:
    """What to write for a key of other trainers: `duration=3ep` for epochs=3; None for a name that is not known.

    Args:
        name: of the key, in lower or upper case, with dashes or underscores.
        value: what was given for it; None where nothing was.
    """
    words = _HERE.get(name.lower().lstrip("-").replace("_", "").replace("-", ""))
    if words is None:
        return None
    for unit in ("ep", ""):
        if f"{{}}{unit}" in words:
            is_number = value is not None and value.replace(".", "", 1).isdigit()
            filled = "..." if not value else value if is_number or unit == "" else "..."
            return words.replace(f"{{}}{unit}", f"{filled}{unit if is_number else ''}")
    return words


def choice_hint(group: str, choice: str, options: Sequence[str]) -> str:
    """What to say about a choice that is not there, after the list of those that are."""
    if group in OPEN and "." in choice.strip("."):
        return f"; a class or function of your own is {group}=custom {group}._target_={choice}"
    if near := get_close_matches(choice.lower(), options, n=1, cutoff=0.85 if group == "model" else 0.6):
        return f"; did you mean {group}={near[0]}?"
    return {
        "model": f"; one of timm: model=timm model.model_name={choice}; your own: model=custom model._target_=mine.Net",
        "data": "; images of your own: data=image_folder data.path=DIRECTORY; datasets of your own: data=custom"
        " data._target_=mine.Data",
        "optimizer": "; others: optimizer=custom optimizer._target_=torch.optim.NAME",
        "loss": "; your own: loss=custom loss._target_=mine.Loss",
        "metrics": "; others: metrics.NAME._target_=torchmetrics.classification.MulticlassF1Score",
        "freeze": "; a rule of your own: freeze.NAME.match=PATTERN",
    }.get(group, "")
