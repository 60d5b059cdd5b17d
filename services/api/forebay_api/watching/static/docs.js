"use strict";

// Swagger UI would otherwise ask validator.swagger.io for a badge.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#swagger-ui", validatorUrl: null });
