from . import dinat as dinat
from . import van as van
