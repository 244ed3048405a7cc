"""Which columns of a participants table say who is related and where people were scanned, and what they say of each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmristream.shards.dataset import Dataset

# Of these names, whatever their case, the first that there is says who is related, where a conversion was not told to keep
# families together: plain ones, HCP's, ABCD's.
FAMILY_COLUMNS = ("family", "family_id", "familyid", "rel_family_id", "ab_g_stc__design_id__fam")
# And of these, where: plain ones, ABCD's.
SITE_COLUMNS = ("site", "site_id", "site_id_l", "ab_g_dyn__design_site", "scanner")


def words_of(dataset: "Dataset", usual_names: Sequence[str]) -> dict[str, str]:
    """What the first of these columns of the participants table says of each subject; empty where there is none."""
    table = dataset.participant_columns
    by_name = {name.lower(): name for name in table}
    name = next((by_name[usual] for usual in usual_names if usual in by_name), None)
    if name is None:
        return {}
    return {
        str(subject): word_of(cell)
        for subject, cell in zip(table["subject"], table[name], strict=True)
        if cell is not None and cell == cell  # not NaN
    }


def word_of(value: object) -> str:
    """Whole numbers without a point: a table of words and one of numbers name the same families."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
