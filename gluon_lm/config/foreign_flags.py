"""Flags of the systems that this package replaces, and what takes their place here."""

INSTEAD_OF_TRAINING = {
    "--checkpoint": "to continue a run, use --resume RUN; to begin a new one with its weights, --init-from RUN",
    "--from-epoch": "to continue a run, use --resume RUN",
    "--eval-only": "to evaluate a run, use python -m gluon_lm.evaluate RUN",
    "--test-mode": "for a short trial, use --max-steps 20",
    **dict.fromkeys(("--model-dir", "--model-name"), "name the run folder with --save"),
    "--export-model": "to write symbol and parameters, use python -m gluon_lm.export RUN --output DIR",
    "--onnx-export": "to write ONNX, use python -m gluon_lm.export RUN --output DIR --format onnx",
    "--use-optimizer": "name the optimiser with --optimizer adam",
    **dict.fromkeys(
        ("--lr-update-interval", "--lr-update-factor"),
        "--decay divides the learning rate whenever validation brings no new best (recipe awd: with --no-ntasgd)",
    ),
    "--num-gpus": "name them, as in --gpus 0,1,2,3",
    "--batch-size-per-gpu": "--batch-size is that of all devices together",
    **dict.fromkeys(("--mode", "--config-file"), "training and evaluation are commands; train --config reads YAML"),
    "--logdir": "name the run folder with --save",
    "--early-stopping": "--patience N stops after N evaluations with no new best",
    "--momentum": "SGD has no momentum here; leave it out, or use --optimizer adam",
    "--warmup": "the learning rate is not warmed up",
    "--forget-bias": "it starts at 1 with --layer-norm, and is learnt",
    "--nhead": "there is no transformer here",
    "--nproj": "layers have no projection; --nhidlast makes the last one narrower",
    "--k": "the number of words in a sampled softmax is --num-sampled",
}
