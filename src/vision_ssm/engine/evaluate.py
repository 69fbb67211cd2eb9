from rich.console import Console
from rich.progress import Progress

from vision_ssm.data import Images, ImageStream
from vision_ssm.data.dataset import how_many
from vision_ssm.data.sampling import find_unreadable
from vision_ssm.engine.task import Evaluation, Task
from vision_ssm.errors import InputError


def evaluate(
    task: Task,
    images: Images,
    batch_size: int | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure a model on labeled images, with a progress bar.

    Args:
        task: The model.
        images: The images.
        batch_size: Batch size; by default what the task says, or 64.
        workers: Number of loading processes; by default chosen from the number of cores.
        console: Where to show the bar; nowhere by default.

    Raises:
        InputError: Some images cannot be read; names up to three of them.
    """
    total = None if isinstance(images, ImageStream) else len(images)
    console = console or Console(quiet=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        row = progress.add_task(f"evaluating on {how_many(images)} images", total=total)
        try:
            return task.evaluate(images, batch_size, workers, lambda count: progress.advance(row, count))
        except InputError:
            check_readable(images, workers)  # names all of them at once
            raise


def check_readable(images: Images, workers: int | None = None) -> None:
    """Refuse images to measure on that cannot be read: without them, the metrics would mean something else.

    Raises:
        InputError: Naming them.
    """
    lines = list(find_unreadable(images, workers).values())
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise InputError(f"{'; '.join(lines[:3])}{more}; repair or remove these validation images")
