// The input gradient of stride 2, see winograd_forms.h.
#define FASTRES_FORM Stride2Turned
#define FASTRES_FORM_EPILOGUES FASTRES_GRADIENT_EPILOGUES
#include "winograd_instantiate.h"
