from . import convit as convit
from . import dinat as dinat
from . import van as van
