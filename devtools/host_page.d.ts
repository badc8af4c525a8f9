/** The two modules of ComfyUI's page that extensions may import, for `tsc`. */

declare module "*/scripts/app.js" {
  import type { ComfyApp } from "@comfyorg/comfyui-frontend-types";
  export const app: ComfyApp;
}

declare module "*/scripts/api.js" {
  import type { ComfyApi } from "@comfyorg/comfyui-frontend-types";
  export const api: ComfyApi;
}
