// F(4x4, 3x3), see winograd_forms.h.
#define FASTRES_FORM Tile4
#define FASTRES_FORM_EPILOGUES FASTRES_EPILOGUES
#include "winograd_instantiate.h"
