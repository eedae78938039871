"""Beside a run, outside its steps: what the machine says of itself, digests for people, and other programs' charts.

    machine.py        one reading: GPU (nvidia.py, amd.py), host.py, the process, the disk
    system_file.py    RUN/system.jsonl, of bounded size
    concerns.py       what in the readings is an event, with advice
    digest.py         ten lines about the run
    command.py        hands a digest to the user's program
    sinks.py          TensorBoard, trackio, wandb
    watch.py          the thread that does all this

Invariant: nothing here takes part in what is learnt, waits for the device, or ends a run; what fails is said once.
"""

from dinox_train.watch.watch import Watch as Watch
