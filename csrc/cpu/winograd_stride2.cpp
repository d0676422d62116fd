// Stride 2, see winograd_forms.h.
#define FASTRES_FORM Stride2
#define FASTRES_FORM_EPILOGUES FASTRES_FORWARD_EPILOGUES
#include "winograd_instantiate.h"
